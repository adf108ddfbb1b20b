"""Which tensors of a student a stage trains: the optimiser moves these, and the plan reckons with them."""

from functools import cache

from radlads.mixers import MIXERS
from radlads.spec import ModelSpec

# Step 3a trains the decay and what leads to it; everything else stays.
DECAY_NAMES = ("time_decay", "time_maa_w", "time_maa_x", ".w0", ".w1", ".w2")


@cache
def trained_names(spec: ModelSpec, train: str) -> frozenset[str]:
    """The tensors that a stage's `train` ("mixer", "all", "layers" or "decay") names.

    A tensor that no forward pass reads is never trained.
    """

    def wanted(name: str) -> bool:
        if train == "all" or not name.startswith("model.layers."):
            return train == "all"
        recurrent = ".self_attn." in name and MIXERS[spec.mixers[int(name.split(".")[2])]].recurrent
        return {
            "layers": True,
            "mixer": recurrent,
            "decay": recurrent and any(part in name for part in DECAY_NAMES),
        }[train]

    return frozenset(name for name, row in spec.tensors().items() if row.read and wanted(name))
