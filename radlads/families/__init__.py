"""The register of teacher families, and `config.json` in both directions."""

from typing import Any

from radlads.errors import fail
from radlads.families import llama, mistral, qwen2, qwen3, seed_oss
from radlads.families.keys import unsupported, write_common
from radlads.spec import ModelSpec

FAMILIES = {module.FAMILY: module for module in (qwen2, qwen3, llama, mistral, seed_oss)}

# `model_type` of a converted model; the spec itself stands under the key "radlads".
STUDENT_TYPE = "radlads"


def read_config(config: object) -> ModelSpec:
    """ModelSpec of a parsed `config.json`: a teacher of a known family, or a student made by radlads."""
    if not isinstance(config, dict):
        raise fail("R204", where="config.json", why="it holds no table of settings", fix="Use the config.json of a model folder")
    kind = config.get("model_type")
    if kind == STUDENT_TYPE:
        try:
            return ModelSpec.from_dict(config["radlads"])
        except (KeyError, ValueError, TypeError) as error:
            raise fail("R204", where="config.json: radlads", why=str(error), fix="Convert the model again") from None
    if kind not in FAMILIES:
        known = ", ".join(sorted([*FAMILIES, STUDENT_TYPE]))
        raise unsupported("model_type", f"{kind!r} is not supported; known: {known}")
    return FAMILIES[kind].read(config)


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """`config.json` of a model: the family's own for a teacher, ours (with `layer_types`) for a student."""
    if spec.recurrent is None:
        return FAMILIES[spec.family].write(spec)
    return {
        "architectures": ["RadladsForCausalLM"],
        "model_type": STUDENT_TYPE,
        **write_common(spec),
        "layer_types": ["full_attention" if name == "softmax" else "linear_attention" for name in spec.mixers],
        "radlads": spec.to_dict(),
    }
