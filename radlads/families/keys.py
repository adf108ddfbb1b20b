"""Checked reading of the Hugging Face config keys that every family shares, and writing them back."""

from typing import Any

from radlads.errors import RadladsError, fail
from radlads.spec import ModelSpec

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
DEFAULT_THETA = 10000.0  # of every family, where a config has none
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor")
MISSING = object()


def positive_int(config: dict[str, Any], key: str, default: object = MISSING) -> int:
    """The positive integer at `key`."""
    value = config.get(key)
    value = default if value is None else value
    if value is MISSING:
        raise missing(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise wrong(key, f"{value!r} is no positive integer")
    return value


def number(config: dict[str, Any], key: str, default: float) -> float:
    """The finite positive number at `key`."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise wrong(key, f"{value!r} is no positive number")
    return float(value)


def flag(config: dict[str, Any], key: str, default: bool) -> bool:
    """The boolean at `key`."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise wrong(key, f"{value!r} is neither true nor false")
    return value


def rope(config: dict[str, Any], head_dim: int) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling): transformers 5 writes `rope_parameters`, older files `rope_theta` and `rope_scaling`, which wins.

    The scaling holds every number that radlads.positions needs, defaults included.
    """
    tables = [config.get("rope_scaling") or {}, config.get("rope_parameters") or {}]
    if not all(isinstance(table, dict) for table in tables):
        raise wrong("rope_parameters", "it is no table of settings")
    nested = tables[0] or tables[1]
    theta = number({**tables[1], **tables[0]}, "rope_theta", number(config, "rope_theta", DEFAULT_THETA))
    if nested.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise unsupported("partial_rotary_factor", "rotary positions on a part of each head are not supported")
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise unsupported("rope_type", f"{kind!r} is not supported; known: {', '.join(ROPE_KINDS)}")
    return theta, None if kind == "default" else {"rope_type": kind, **rope_numbers(config, nested, kind, head_dim)}


def rope_numbers(config: dict[str, Any], nested: dict[str, Any], kind: str, head_dim: int) -> dict[str, Any]:
    """The settings of one kind of scaling, checked."""
    found: dict[str, Any] = {}
    if kind in ("llama3", "yarn", "longrope"):
        longest = positive_int(config, "max_position_embeddings", 32768)
        original = number(nested, "original_max_position_embeddings", longest)
        found["original_max_position_embeddings"] = number(config, "original_max_position_embeddings", original)
        # Where no factor is given, it is the growth of the context.
        growth = longest / found["original_max_position_embeddings"]
    if kind in ("yarn", "longrope"):
        found["factor"] = number(nested, "factor", growth)
        found |= {key: number(nested, key, 1.0) for key in ("attention_factor",) if nested.get(key) is not None}
    for key in {"linear": ("factor",), "dynamic": ("factor",), "llama3": LLAMA3_KEYS}.get(kind, ()):
        if key not in nested:
            raise missing(f"rope {key}")
        found[key] = number(nested, key, 1.0)
    if kind == "yarn":
        keys = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        found |= {key: number(nested, key, 1.0) for key in keys if nested.get(key)}
        found["truncate"] = flag(nested, "truncate", True)
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            values = nested.get(key)
            if not isinstance(values, list) or len(values) != head_dim // 2:
                raise wrong(f"rope {key}", f"it must be a list of {head_dim // 2} numbers, one for each pair of a head")
            found[key] = [number({key: value}, key, 1.0) for value in values]
    return found


def missing(key: str) -> RadladsError:
    """A key that has to be there."""
    return fail("R204", where=f"config.json: {key}", why="the key is missing", fix="Copy it from the original config.json")


def wrong(key: str, why: str) -> RadladsError:
    """A value that cannot be."""
    return fail("R204", where=f"config.json: {key}", why=why, fix="Correct the value")


def unsupported(key: str, why: str) -> RadladsError:
    """A model that cannot be converted."""
    return fail("R205", where=f"config.json: {key}", why=why, fix="Choose another teacher")


def read_common(
    config: dict[str, Any], family: str, *, head_dim: int | None = None, kv_heads: int | None = None
) -> dict[str, Any]:
    """Fields of ModelSpec that have the same keys in every family; the numbers are what the family's own class defaults to."""
    if config.get("hidden_act", "silu") != "silu":
        raise unsupported("hidden_act", f"{config['hidden_act']!r} is not supported, only 'silu' is")
    if config.get("use_sliding_window"):
        raise unsupported("use_sliding_window", "sliding-window attention is not supported")
    if config.get("quantization_config") or config.get("quantization"):
        raise unsupported("quantization", "the weights are quantised and a float teacher is needed")
    hidden, heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    size = positive_int(config, "head_dim", head_dim or max(1, hidden // heads))
    rope_theta, rope_scaling = rope(config, size)
    return {
        "family": family,
        "hidden_size": hidden,
        "intermediate_size": positive_int(config, "intermediate_size"),
        "num_layers": positive_int(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": positive_int(config, "num_key_value_heads", kv_heads or heads),
        "head_dim": size,
        "vocab_size": positive_int(config, "vocab_size"),
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-6),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "max_positions": positive_int(config, "max_position_embeddings", 32768),
        "tie_embeddings": flag(config, "tie_word_embeddings", False),
    }


def build_spec(fields: dict[str, Any]) -> ModelSpec:
    """ModelSpec from checked fields; numbers that do not fit together become a config error."""
    try:
        return ModelSpec(**fields)
    except ValueError as error:
        raise fail("R204", where="config.json", why=str(error), fix="Correct the value") from None


def write_common(spec: ModelSpec) -> dict[str, Any]:
    """Config keys of every family. The rope base is written in both spellings: each library reads only one."""
    rope_parameters = {"rope_type": "default", **(spec.rope_scaling or {}), "rope_theta": spec.rope_theta}
    config: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_parameters": rope_parameters,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tie_embeddings,
        "hidden_act": "silu",
    }
    if spec.rope_scaling:
        config["rope_scaling"] = dict(spec.rope_scaling)
    return config
