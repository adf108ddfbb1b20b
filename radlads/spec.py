"""The one description of a model: dimensions, the mixer of each layer, tensors, state, operations.

Standard library only. Both backends, the converters, the planner and the oracle read it; shipped model files carry it.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from radlads.mixers import MIXERS
from radlads.mixers.table import Row


@dataclass(frozen=True)
class MixerOptions:
    """Flags of a student's mixers (docs/mixers.md says which equation each one switches, `Mixer.flags` who reads it)."""

    gate: str = "lowrank"  # "full", "lowrank" or "none"
    rope: bool = True
    token_shift: bool = False
    variant: str = "C"  # RAD-RWKV7 era: "A", "B" or "C"
    balance: bool = True  # RAD-RWKV6: key scaled by (1 - w)
    groupnorm: bool = False
    clamp: float | None = None  # RAD-RWKV6: lower bound of the log-decay
    kept_rope: bool = True  # rotary positions in the layers that stay softmax


DEFAULT_OPTIONS = {
    "rwkv6": MixerOptions(gate="full", rope=False, token_shift=True, clamp=-5.0),
    "rwkv7": MixerOptions(gate="lowrank", rope=True, token_shift=False, variant="C"),
    **{name: MixerOptions(kept_rope=False) for name in ("hxa079", "hxa07a", "hxa07b", "hxa07c")},
}


@dataclass(frozen=True)
class Ranks:
    """Widths of the low-rank pairs; 0 where the mixer has no such pair."""

    tokenshift: int = 0
    decay: int = 0
    iclr: int = 0
    value_residual: int = 0
    key_residual: int = 0
    gate: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions and mixers of a decoder-only model.

    Letters: D hidden, F feed-forward, L layers, H heads, Hkv key/value heads, N head size, C = H*N, Ckv = Hkv*N, V vocab.
    A teacher has `mixers` all "softmax"; a student names a recurrent mixer for at least one layer.
    Raises ValueError, naming the field, when the numbers do not fit together.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_positions: int = 32768
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mixers: tuple[str, ...] = ()
    mixer: MixerOptions = field(default_factory=MixerOptions)
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_layers > 4096:
            raise ValueError(f"num_layers is {self.num_layers}, more than 4096")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even one")
        check_rope(self.rope_scaling, self.head_dim)
        if not self.mixers:
            object.__setattr__(self, "mixers", ("softmax",) * self.num_layers)
        if len(self.mixers) != self.num_layers:
            raise ValueError(f"mixers names {len(self.mixers)} layers, num_layers is {self.num_layers}")
        unknown = sorted(set(self.mixers) - set(MIXERS))
        if unknown:
            raise ValueError(f"unknown mixer {unknown[0]!r}; known: {', '.join(MIXERS)}")
        if len({name for name in self.mixers if MIXERS[name].recurrent}) > 1:
            raise ValueError("a model has one kind of recurrent mixer")
        if self.mixer.gate not in ("full", "lowrank", "none"):
            raise ValueError(f"gate {self.mixer.gate!r} is none of full, lowrank, none")
        if self.mixer.variant not in ("A", "B", "C"):
            raise ValueError(f"variant {self.mixer.variant!r} is none of A, B, C")

    # Letters of the equations.
    D = property(lambda self: self.hidden_size)
    F = property(lambda self: self.intermediate_size)
    L = property(lambda self: self.num_layers)
    H = property(lambda self: self.num_heads)
    Hkv = property(lambda self: self.num_kv_heads)
    N = property(lambda self: self.head_dim)
    C = property(lambda self: self.num_heads * self.head_dim)
    Ckv = property(lambda self: self.num_kv_heads * self.head_dim)
    V = property(lambda self: self.vocab_size)

    @property
    def recurrent(self) -> str | None:
        """Name of the recurrent mixer, None for a teacher."""
        return next((name for name in self.mixers if MIXERS[name].recurrent), None)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Indices of the softmax layers."""
        return tuple(i for i, name in enumerate(self.mixers) if name == "softmax")

    def tensors(self) -> dict[str, Row]:
        """Every tensor of the model by its full name, in file order."""
        D, F = self.D, self.F
        rows = {"model.embed_tokens.weight": Row("embed_tokens.weight", (self.V, D))}
        for layer, mixer in enumerate(self.mixers):
            prefix = f"model.layers.{layer}."
            rows[f"{prefix}input_layernorm.weight"] = Row("input_layernorm.weight", (D,))
            for row in MIXERS[mixer].rows(self, layer):
                rows[f"{prefix}self_attn.{row.name}"] = row
            rows[f"{prefix}post_attention_layernorm.weight"] = Row("post_attention_layernorm.weight", (D,))
            for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
                rows[f"{prefix}mlp.{name}.weight"] = Row(f"{name}.weight", shape)
                if self.mlp_bias:
                    rows[f"{prefix}mlp.{name}.bias"] = Row(f"{name}.bias", shape[:1])
        rows["model.norm.weight"] = Row("norm.weight", (D,))
        if not self.tie_embeddings:
            rows["lm_head.weight"] = Row("lm_head.weight", (self.V, D))
        return rows

    def parameters(self) -> int:
        """Number of parameters, each stored tensor counted once."""
        return sum(_product(row.shape) for row in self.tensors().values())

    def state(self) -> list[dict[str, tuple[int, ...]]]:
        """Shapes of the recurrent state of each layer, without the batch axis; empty for softmax layers."""
        return [MIXERS[name].state(self) for name in self.mixers]

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes in float32 of what one sequence leaves behind after `tokens` tokens: of a fixed size, but for softmax layers."""
        fixed = sum(_product(shape) for layer in self.state() for shape in layer.values())
        return 4 * (fixed + 2 * self.Ckv * len(self.kept_layers) * tokens)

    def flops(self, tokens: int = 1) -> int:
        """Multiply-adds times two of a forward pass over `tokens` tokens: all matrices, and the recurrence itself.

        The recurrence counts 4 N^2 (rwkv6) or 8 N^2 (rwkv7, hxa) per head; softmax scores are left to the planner,
        which knows the context length.
        """
        matrices = sum(
            2 * _product(row.shape) for name, row in self.tensors().items() if len(row.shape) == 2 and "embed_tokens" not in name
        )
        if self.tie_embeddings:
            matrices += 2 * self.V * self.D
        return tokens * (matrices + sum(MIXERS[name].scan_flops * self.H * self.N**2 for name in self.mixers))

    def as_teacher(self) -> "ModelSpec":
        """The same model with softmax attention in every layer."""
        return replace(self, mixers=("softmax",) * self.L, mixer=MixerOptions(), ranks=Ranks())

    def as_student(
        self, mixer: str, keep_softmax: tuple[int, ...] = (), *, ranks: dict[str, int] | None = None, **flags: Any
    ) -> "ModelSpec":
        """The student of this teacher: `mixer` in every layer but `keep_softmax`; `flags` override MixerOptions.

        `ranks` override the widths that the mixer's rules give. Raises ValueError for what does not fit.
        """
        if mixer not in DEFAULT_OPTIONS:
            raise ValueError(f"unknown student architecture {mixer!r}; known: {', '.join(DEFAULT_OPTIONS)}")
        outside = [layer for layer in keep_softmax if not 0 <= layer < self.L]
        if outside:
            raise ValueError(f"layer {outside[0]} to keep does not exist; the model has layers 0 to {self.L - 1}")
        if len(set(keep_softmax)) == self.L:
            raise ValueError("every layer is kept as softmax: nothing would be converted")
        known = {f.name for f in fields(MixerOptions)}
        wrong = sorted(set(flags) - known)
        if wrong:
            raise ValueError(f"unknown mixer option {wrong[0]!r}; known: {', '.join(sorted(known))}")
        read = (*MIXERS[mixer].flags, "kept_rope")
        unread = sorted(name for name in flags if name not in read and flags[name] != getattr(DEFAULT_OPTIONS[mixer], name))
        if unread:
            raise ValueError(f"{mixer} has no option {unread[0]!r}; it has {', '.join(read)}")
        if mixer == "rwkv7" and "groupnorm" not in flags:
            flags["groupnorm"] = flags.get("variant", "C") != "C"  # eras A and B normalise the output, C balances the key
        if mixer == "rwkv6" and "balance" not in flags:
            flags["balance"] = not flags.get("groupnorm", False)
        options = replace(DEFAULT_OPTIONS[mixer], **flags)
        unused = {name for name, used in (("gate", options.gate == "lowrank"), ("tokenshift", options.token_shift)) if not used}
        widths = {name: rule.width(self) for name, rule in MIXERS[mixer].ranks.items() if name not in unused}
        for name, width in (ranks or {}).items():
            if name not in widths:
                where = " with these options" if name in unused else ""
                raise ValueError(f"{mixer} has no rank {name!r}{where}; it has {', '.join(widths)}")
            widths[name] = width
        return replace(
            self,
            mixers=tuple("softmax" if i in keep_softmax else mixer for i in range(self.L)),
            mixer=options,
            ranks=Ranks(**widths),
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        data = asdict(self)
        data["mixers"] = list(self.mixers)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelSpec":
        """The inverse of `to_dict`; ValueError on a missing, unknown or ill-typed field."""
        known = {f.name for f in fields(cls)}
        wrong = sorted(set(data) - known)
        if wrong:
            raise ValueError(f"unknown field {wrong[0]!r}")
        values = dict(data)
        try:
            values["mixers"] = tuple(values.get("mixers", ()))
            values["mixer"] = MixerOptions(**values.get("mixer", {}))
            values["ranks"] = Ranks(**values.get("ranks", {}))
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from None


ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def check_rope(scaling: Any, head_dim: int) -> None:
    """ValueError unless `scaling` is None or a known kind with all its numbers."""
    if scaling is None:
        return
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if kind not in ROPE_NUMBERS:
        raise ValueError(f"rope_scaling {kind!r} is none of {', '.join(ROPE_NUMBERS)}")
    lists = ("short_factor", "long_factor") if kind == "longrope" else ()
    for name in (*ROPE_NUMBERS[kind], *lists):
        values = scaling.get(name)
        numbers = values if name in lists and isinstance(values, list | tuple) and len(values) == head_dim // 2 else [values]
        if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e30 for x in numbers):
            raise ValueError(f"rope_scaling {kind} needs positive {name}, got {values!r}")
        if name in lists and len(numbers) != head_dim // 2:
            raise ValueError(f"rope_scaling {kind} needs {head_dim // 2} numbers of {name}")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
