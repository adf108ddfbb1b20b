"""What the names and shapes of a model's tensors show by themselves, where no config.json says the rest."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from radlads.families.published import Shapes, attention_tensors, mixer_of, ranks_of, refuse_experts, size, usual_shapes
from radlads.mixers import MIXERS


@dataclass(frozen=True)
class Outline:
    """The mixer of each layer, the one that is recurrent in most (None in a teacher), and sizes by their names in a spec."""

    mixers: tuple[str, ...]
    recurrent: str | None
    dimensions: dict[str, Any]
    notices: tuple[str, ...]


def outline(shapes: Shapes) -> Outline:
    """The outline of a model from its tensors {full name: shape}, named as in Hugging Face folders.

    R203 tensors of no known layout, R205 a mixture of experts.
    """
    refuse_experts(shapes, None)
    layers = attention_tensors(shapes)
    kinds = [mixer_of(names, index) for index, names in enumerate(layers)]
    recurrent = next((name for name, _ in Counter(kinds).most_common() if MIXERS[name].recurrent), None)
    dimensions: dict[str, Any] = {
        "hidden_size": size(shapes, "model.embed_tokens.weight", 1),
        "intermediate_size": size(shapes, "model.layers.0.mlp.gate_proj.weight", 0),
        "vocab_size": size(shapes, "model.embed_tokens.weight", 0),
        "num_layers": len(layers),
    }
    if recurrent is not None:
        usual = usual_shapes([layer for layer, name in zip(layers, kinds, strict=True) if name == recurrent])
        dimensions["ranks"] = asdict(ranks_of(usual, recurrent, {}, []))
    twins = ("hxa07c has the same tensors as hxa07b, and may be meant",) if recurrent == "hxa07b" else ()
    return Outline(tuple(kinds), recurrent, dimensions, twins)
