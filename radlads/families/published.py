"""The models published by the authors of the method and by OpenMOSE: their spec from tensor names and shapes.

Ranks always come from shapes, flags from the presence of tensors; the config adds what no tensor shows. Whatever was inferred
is told in notices, with the way to override it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from radlads.errors import RadladsError, fail
from radlads.families import FAMILIES, STUDENT_TYPE, read_config
from radlads.families.keys import build_spec, flag, read_common, unsupported
from radlads.mixers import MIXERS
from radlads.spec import MixerOptions, ModelSpec, Ranks

# model_type of a published config: the teacher's family, None where the tensors tell it.
PUBLISHED = {"rwkv6qwen2": "qwen2", "rwkv7qwen2": "qwen2", "rwkv7qwen3": "qwen3", "rwkv079qwen3": None}
MOE_TYPES = ("qwen3_moe", "rwkv079qwen3moe", "rwkv07bmoe", "qwen2_moe")
MARKS = (".self_attn.w0", ".self_attn.time_decay")  # every recurrent layer has one of them
SCALARS = ("layer_architecture", "head_size_record")  # what the hxa training code registers besides weights
NO_WEIGHTS = (*SCALARS, ".inv_freq")  # how the names of stored tensors end that no model of ours has
OVERRIDES = "radlads_options"  # a table of MixerOptions in the config, which overrides whatever was inferred

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Detected:
    """A spec, what was inferred to get it, and the stored tensors that no model of ours has."""

    spec: ModelSpec
    notices: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def is_published(config: object) -> bool:
    """Whether a parsed config.json is that of a published converted model, dense or not."""
    if not isinstance(config, dict):
        return False
    return config.get("model_type") in PUBLISHED or "rwkv_architecture" in config


def spec_of(config: object, shapes: Shapes, *, variant: str | None = None) -> Detected:
    """The spec of any folder: a teacher's or our student's by its config alone, a published model's by `detect`.

    R101 for a variant where there is nothing to choose, else as `detect` and `read_config`.
    """
    ours = isinstance(config, dict) and config.get("model_type") == STUDENT_TYPE
    if isinstance(config, dict) and not ours and (is_published(config) or any(name.endswith(MARKS) for name in shapes)):
        return detect(shapes, config, variant=variant)
    spec = read_config(config)
    if variant is not None:
        raise fail("R101", where="--variant", why="the model's own config says what it is", fix="Leave it out")
    return Detected(spec)


def detect(shapes: Shapes, config: Mapping[str, Any] | None, *, variant: str | None = None) -> Detected:
    """The spec of a converted model from its tensors {full name: shape} and a config: a published one, or the teacher's.

    Names are those of Hugging Face folders (`model.layers.0.self_attn.w0`). `variant` chooses the era of RAD-RWKV7 (A, B, C),
    which wins over what was found, or tells hxa07B from hxa07C.
    R203 tensors of no known layout, R204 config missing, damaged or of another model, R205 not supported, R101 bad variant.
    """
    refuse_experts(shapes, config)
    if config is None:
        why = "head size, norm epsilon and rotary base cannot be read from tensors"
        raise fail("R204", where="config.json", why=why, fix="Pass --config with the teacher's folder or its config.json")
    layers = attention_tensors(shapes)
    notices: list[str] = []
    kinds = [mixer_of(names, index) for index, names in enumerate(layers)]
    # Where one layer differs from the others it is at fault, and the check of all tensors will say in what.
    recurrent = next((name for name, _ in Counter(kinds).most_common() if MIXERS[name].recurrent), None)
    if recurrent is None:
        why = "no layer has the tensors of a recurrent mixer"
        raise fail("R203", where="weights", why=why, fix="Open a teacher with its own config.json")
    first = usual_shapes([layer for layer, name in zip(layers, kinds, strict=True) if MIXERS[name].recurrent])
    if recurrent == "hxa07b":
        recurrent = second_value_form(config, variant)
    mixers = tuple(recurrent if MIXERS[name].recurrent else name for name in kinds)
    check_stated_kind(recurrent, config)
    check_kept(mixers, config, notices)
    base = base_spec(shapes, first, config, mixers, notices)
    if PUBLISHED.get(str(config.get("model_type")), "") is None:
        told = "norms of q and k" if base.qk_norm else "biases" if base.qkv_bias else "neither biases nor norms of q and k"
        notices.append(f"teacher family {base.family}: the layout names none, there are {told} (the teacher's --config tells)")
    if variant is not None and recurrent not in ("rwkv7", "hxa07b", "hxa07c"):
        raise fail("R101", where="--variant", why=f"a model with {recurrent} layers has no variants", fix="Leave it out")
    options = mixer_options(first, config, recurrent, variant, bool(base.kept_layers), notices)
    spec = build_spec({**shallow(base), "mixer": options, "ranks": ranks_of(first, recurrent, config, notices)})
    unread = [name for name, row in spec.tensors().items() if not row.read and name in shapes]
    if unread:
        notices.append(f"{len(unread)} stored tensors are never read and may hold anything: {listing(unread)}")
    ignored = tuple(name for name in shapes if name.rpartition(".")[2] in SCALARS)
    if ignored:
        notices.append(f"{len(ignored)} records of the training code are left out: {', '.join(SCALARS)}")
    return Detected(spec, tuple(notices), ignored)


def refuse_experts(shapes: Shapes, config: Mapping[str, Any] | None) -> None:
    """R205 for a mixture of experts."""
    config = config or {}
    if config.get("model_type") in MOE_TYPES or config.get("num_experts") or any(".mlp.experts." in name for name in shapes):
        why = "it is a mixture of experts, and only dense feed-forward layers are supported"
        raise fail("R205", where="config.json: model_type", why=why, fix="Choose a dense model")


def attention_tensors(shapes: Shapes) -> list[dict[str, Shape]]:
    """Per layer the tensors below `self_attn.`; R203 where a layer is missing or the model has none."""
    found: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        parts = name.split(".", 3)
        if name.startswith("model.layers.") and len(parts) == 4 and parts[2].isdecimal() and len(parts[2]) < 5:
            layer = found.setdefault(int(parts[2]), {})
            if parts[3].startswith("self_attn.") and not parts[3].endswith(NO_WEIGHTS):
                layer[parts[3].removeprefix("self_attn.")] = tuple(shape)
    gaps = [index for index in range(max(found, default=-1) + 1) if not found.get(index)]
    if not found or gaps:
        why = f"layer {gaps[0]} has no attention tensors" if gaps else "it has no tensors named model.layers.0.…"
        raise fail("R203", where="weights", why=why, fix="Give all files of the model")
    return [found[index] for index in range(len(found))]


def mixer_of(names: Mapping[str, Shape], layer: int) -> str:
    """The mixer that a layer's tensors show, one lost or not; "hxa07b" stands for 07B and 07C, which have the same. R203."""
    if names.keys() & {"receptance.weight", "key.weight"}:
        return "hxa079" if names.keys() & {"k0", "k1"} else "hxa07b" if names.keys() & {"v1", "v2"} else "hxa07a"
    marks = {"rwkv6": {"time_decay", "time_decay_w1"}, "rwkv7": {"w0", "w1"}, "softmax": {"q_proj.weight", "k_proj.weight"}}
    for mixer, tensors in marks.items():
        if names.keys() & tensors:
            return mixer
    why = f"layer {layer} has the tensors of no known mixer: {listing(sorted(names))}"
    raise fail("R203", where="weights", why=why, fix="Check that this is a model of the RADLADS or hxa kind")


def usual_shapes(layers: list[dict[str, Shape]]) -> dict[str, Shape]:
    """The tensors that at least half of the layers have, in the shape that most of them have."""
    found: dict[str, Counter[Shape]] = {}
    for layer in layers:
        for name, shape in layer.items():
            found.setdefault(name, Counter())[shape] += 1
    return {name: shapes.most_common(1)[0][0] for name, shapes in found.items() if 2 * shapes.total() >= len(layers)}


def second_value_form(config: Mapping[str, Any], variant: str | None) -> str:
    """ "hxa07b" or "hxa07c", which no tensor tells apart; R204 where the config does not either."""
    stated = str(config.get("rwkv_architecture", "")).lower()
    chosen = f"hxa07{variant.lower()}" if variant in ("B", "C") else stated
    if chosen not in ("hxa07b", "hxa07c"):
        why = "hxa07b and hxa07c have the same tensors and the key does not say which it is"
        raise fail("R204", where="config.json: rwkv_architecture", why=why, fix="Pass --variant B or --variant C")
    return chosen


def check_stated_kind(recurrent: str, config: Mapping[str, Any]) -> None:
    """R204 where the config names another mixer than the tensors show."""
    kind = str(config.get("model_type"))
    stated = str(config.get("rwkv_architecture") or (kind[:5] if kind in PUBLISHED and kind != "rwkv079qwen3" else "")).lower()
    if stated and stated != recurrent:
        why = f"it says {stated}, the tensors are those of {recurrent}"
        raise fail("R204", where="config.json: rwkv_architecture", why=why, fix="Check that config and weights belong together")


def check_kept(mixers: tuple[str, ...], config: Mapping[str, Any], notices: list[str]) -> None:
    """R203 where the config's list of softmax layers is not that of the tensors; a notice where it has none."""
    kept = [index for index, name in enumerate(mixers) if name == "softmax"]
    stated = config.get("transformer_layers")
    if stated is None and type(config.get("num_attention_layers")) is int:
        stated = list(range(max(0, len(mixers) - config["num_attention_layers"]), len(mixers)))
    if stated is not None and (not isinstance(stated, list) or sorted(map(str, stated)) != sorted(map(str, kept))):
        why = f"the config keeps softmax in layers {stated}, the tensors in {kept}"
        raise fail("R203", where="config.json: transformer_layers", why=why, fix="Check that config and weights belong together")
    if stated is None and kept:
        notices.append(f"layers {', '.join(map(str, kept))} are softmax attention: they have q_proj and no recurrent tensors")


def base_spec(
    shapes: Shapes, first: Mapping[str, Shape], config: Mapping[str, Any], mixers: tuple[str, ...], notices: list[str]
) -> ModelSpec:
    """Everything but the mixers' flags and ranks; R204 naming every size in which config and tensors differ."""
    settings = dict(config)
    if "softmax" not in mixers:
        settings["use_sliding_window"] = False  # it is about layers that the model does not have
    qk_norm = bool(first.keys() & {"q_norm.weight", "r_norm.weight", "k_norm.weight"})
    query = "receptance" if "receptance.weight" in first else "q_proj"
    stated = stated_spec(settings, qk_norm, f"{query}.bias" in first)
    measured = {
        "hidden_size": size(shapes, "model.embed_tokens.weight", 1),
        "vocab_size": size(shapes, "model.embed_tokens.weight", 0),
        "intermediate_size": size(shapes, "model.layers.0.mlp.gate_proj.weight", 0),
        "num_layers": len(mixers),
        "head_dim": head_size(first, stated.head_dim),
    }
    measured["num_heads"] = size(first, f"{query}.weight", 0) // measured["head_dim"]
    measured["num_kv_heads"] = size(first, "key.weight" if query == "receptance" else "k_proj.weight", 0) // measured["head_dim"]
    wrong = [f"{key} is {getattr(stated, key)}, the tensors have {value}" for key, value in measured.items()
             if getattr(stated, key) != value]  # fmt: skip
    if wrong:
        fix = "Give the config of this model or of its teacher with --config"
        raise fail("R204", where="config.json", why="; ".join(wrong), fix=fix)
    tied = "lm_head.weight" not in shapes
    if tied and config.get("tie_word_embeddings") is False:
        why = "lm_head.weight is missing, and the config says that it is not tied to the embedding"
        fix = "Give all files of the model, or set tie_word_embeddings to true with --config"
        raise fail("R203", where="weights", why=why, fix=fix)
    if tied != stated.tie_embeddings:
        held = "no lm_head is stored, so the embedding is the head" if tied else "an lm_head is stored, and it is used"
        told = f"although the config says tie_word_embeddings {str(stated.tie_embeddings).lower()}"
        notices.append(f"{held}, {told}" if "tie_word_embeddings" in config else f"{held}: the config does not say")
    if "rms_norm_eps" not in config:
        notices.append(f"norm epsilon {stated.rms_norm_eps:g}: the config has no rms_norm_eps (set it in --config)")
    if "rope_theta" not in config and "rope_parameters" not in config:
        notices.append(f"rotary base {stated.rope_theta:g}: the config has no rope_theta (set it in --config)")
    return replace(
        stated,
        mixers=mixers,
        tie_embeddings=tied,
        qkv_bias=f"{query}.bias" in first,
        output_bias=("output.bias" if query == "receptance" else "o_proj.bias") in first,
        mlp_bias="model.layers.0.mlp.gate_proj.bias" in shapes,
        qk_norm=qk_norm,
    )


def stated_spec(config: dict[str, Any], qk_norm: bool, bias: bool) -> ModelSpec:
    """What the config says of the sizes: a published one by its own keys, a teacher's by its family."""
    kind = config.get("model_type")
    if kind not in PUBLISHED:
        if kind in FAMILIES:
            return FAMILIES[kind].read(config)
        raise unsupported("model_type", f"{kind!r} is not supported; known: {', '.join(sorted([*FAMILIES, *PUBLISHED]))}")
    family = PUBLISHED[kind] or ("qwen3" if qk_norm else biased_family(config) if bias else "llama")
    return build_spec(read_common(config, family))


def biased_family(config: Mapping[str, Any]) -> str:
    """Family of an hxa model with biases on q, k and v."""
    return "seed_oss" if "seed" in str(config.get("base_model", "")).lower() else "qwen2"


def head_size(first: Mapping[str, Shape], stated: int) -> int:
    """N from the tensors that show it, else the config's."""
    for name, axis in (("r_k", 1), ("r_norm.weight", 0), ("k_norm.weight", 0)):
        if name in first:
            return size(first, name, axis)
    return stated


def mixer_options(
    first: Mapping[str, Shape],
    config: Mapping[str, Any],
    recurrent: str,
    variant: str | None,
    hybrid: bool,
    notices: list[str],
) -> MixerOptions:
    """The flags of the mixers; each that neither tensor nor config shows becomes a notice."""
    settings = dict(config)
    options = MixerOptions(
        gate="full" if "gate.weight" in first else "lowrank" if "g1" in first else "none",
        token_shift="time_maa_x" in first,
        groupnorm="ln_x.weight" in first,
        rope=mixer_rope(settings, recurrent, notices),
    )
    if recurrent == "rwkv6":
        options = replace(options, clamp=-5.0, balance=balanced(settings, options.groupnorm, "RAD-RWKV6", notices))
        notices.append(f'log-decay clamped at -5: no file records it ("{OVERRIDES}": {{"clamp": null}} in --config turns it off)')
    elif recurrent == "rwkv7":
        options = replace(options, variant=variant or era(settings, options.groupnorm, notices))
        if variant:
            notices.append(f"RAD-RWKV7 variant {variant}: as asked")
    if hybrid:
        options = replace(options, kept_rope=kept_rope(settings, recurrent, notices))
    return overridden(options, settings.get(OVERRIDES), notices)


def mixer_rope(config: dict[str, Any], recurrent: str, notices: list[str]) -> bool:
    """Whether recurrent layers have rotary positions."""
    if recurrent.startswith("hxa"):
        if "nope_in_rwkv" in config:
            return not flag(config, "nope_in_rwkv", False)
        notices.append("rotary positions in recurrent layers: as all hxa models have (nope_in_rwkv in --config overrides)")
        return True
    if "use_rope" in config:
        return flag(config, "use_rope", False)
    rope = recurrent == "rwkv7"
    known = "RAD-RWKV7 has them in all known models" if rope else "released RAD-RWKV6 models have none"
    notices.append(f"rotary positions {'on' if rope else 'off'}: {known} (use_rope in --config overrides)")
    return rope


def kept_rope(config: dict[str, Any], recurrent: str, notices: list[str]) -> bool:
    """Whether layers that are softmax have rotary positions."""
    if "nope_in_transformer" in config:
        return not flag(config, "nope_in_transformer", False)
    rope = not recurrent.startswith("hxa")
    known = "as the teacher has" if rope else "hxa models are trained without from stage 2 on"
    notices.append(f"rotary positions in softmax layers {'on' if rope else 'off'}: {known} (nope_in_transformer overrides)")
    return rope


def balanced(config: dict[str, Any], groupnorm: bool, what: str, notices: list[str]) -> bool:
    """Whether keys are balanced: the config's word, else the opposite of a stored ln_x."""
    if "balance_state" in config:
        return flag(config, "balance_state", True)
    held = "ln_x is stored" if groupnorm else "no ln_x is stored"
    notices.append(f"{what} with state balancing {'off' if groupnorm else 'on'}: {held} (balance_state in --config overrides)")
    return not groupnorm


def era(config: dict[str, Any], groupnorm: bool, notices: list[str]) -> str:
    """Variant of RAD-RWKV7: C is the balanced one; A looks like B and must be asked for."""
    if "balance_state" in config:
        chosen, why = "C" if flag(config, "balance_state", True) else "B", "by balance_state of the config"
    else:
        chosen, why = ("B", "ln_x is stored") if groupnorm else ("C", "no ln_x is stored")
    notices.append(f"RAD-RWKV7 variant {chosen}: {why}; A cannot be told from B (--variant overrides)")
    return chosen


def overridden(options: MixerOptions, table: object, notices: list[str]) -> MixerOptions:
    """The options with the values of the config's override table; R204 for what is no option."""
    if table is None:
        return options
    known = {field.name for field in fields(MixerOptions)}
    if not isinstance(table, dict) or not set(table) <= known:
        why = f"it must be a table of {', '.join(sorted(known))}"
        raise fail("R204", where=f"config.json: {OVERRIDES}", why=why, fix="Correct the table")
    for name, value in table.items():
        fits = type(value) is type(getattr(options, name)) if name != "clamp" else value is None or type(value) in (int, float)
        if not fits:
            raise fail("R204", where=f"config.json: {OVERRIDES}", why=f"{name} cannot be {value!r}", fix="Correct the value")
    notices.append(f"{OVERRIDES} of the config: {', '.join(f'{name} {value}' for name, value in table.items())}")
    return replace(options, **table)


def ranks_of(first: Mapping[str, Shape], recurrent: str, config: Mapping[str, Any], notices: list[str]) -> Ranks:
    """Widths of the low-rank pairs from shapes; a notice for those that the config states otherwise."""
    places = {
        "tokenshift": ("time_maa_w2", 1),
        "decay": ("time_decay_w1" if recurrent == "rwkv6" else "w1", 1),
        "iclr": ("a1", 1),
        "value_residual": ("v1", 1),
        "key_residual": ("k1", 1),
        "gate": ("g1", 1),
    }
    keys = {"value_residual": "lora_rank_value_residual_mix", "key_residual": "lora_rank_key_residual_mix"}
    widths = {name: size(first, *place) for name, place in places.items() if place[0] in first}
    for name, width in widths.items():
        key = keys.get(name, f"lora_rank_{name}")
        if config.get(key) not in (None, width):
            notices.append(f"rank {name} is {width} by its tensor, although the config says {key} {config[key]!r}")
    notices.append(f"ranks from shapes: {', '.join(f'{name} {width}' for name, width in widths.items())}")
    return Ranks(**widths)


def size(shapes: Shapes, name: str, axis: int) -> int:
    """One dimension of a tensor; R203 where it is missing or has fewer."""
    if name not in shapes or len(shapes[name]) <= axis or shapes[name][axis] < 1:
        why = f"{name} is missing" if name not in shapes else f"{name} is {list(shapes[name])}"
        raise bad_tensor(why)
    return shapes[name][axis]


def bad_tensor(why: str) -> RadladsError:
    """R203 for a tensor without which nothing can be told."""
    return fail("R203", where="weights", why=why, fix="Give all files of the model")


def listing(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shallow(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a spec, as they are."""
    return {field.name: getattr(spec, field.name) for field in fields(spec)}
