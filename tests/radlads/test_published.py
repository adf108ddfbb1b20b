"""Detection of published models: flags, ranks and kept layers from names and shapes, and what it says about it."""

from dataclasses import replace
from typing import Any

import pytest

from radlads.errors import RadladsError
from radlads.families.layouts import NAMES, write_layout
from radlads.families.published import detect
from tests.published import QRWKV6_7B, QRWKV7_7B, SYSTEMS, System

BY_NAME = {system.name: system for system in SYSTEMS}
HXA, SEED = BY_NAME["HRWKV7-hxa079-Qwen3-8B"], BY_NAME["RWKV-Seed-OSS-36B-hxa07A"]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_full_size_is_the_published_one(system: System) -> None:
    spec = detect(system.shapes(), system.config()).spec
    assert {name: row.shape for name, row in spec.tensors().items()} == system.shapes()
    keys, parameters, mib = system.facts
    assert (len(spec.tensors()), spec.parameters()) == (keys, parameters)
    assert round(spec.state_bytes() / 2**20, 1) == mib
    assert spec.recurrent == system.kind and spec.kept_layers == system.kept
    assert (spec.rope_theta, spec.rms_norm_eps) == (system.theta, system.eps)
    assert spec.family == system.family


def test_a_teachers_config_serves_too() -> None:
    config = {key: value for key, value in QRWKV7_7B.config().items() if not key.startswith("lora_rank")}
    spec = detect(QRWKV7_7B.shapes(), {**config, "model_type": "qwen2"}).spec
    assert spec == detect(QRWKV7_7B.shapes(), QRWKV7_7B.config()).spec


def notices(system: System, variant: str | None = None, without: tuple[str, ...] = (), **changes: Any) -> str:
    config = {key: value for key, value in {**system.config(), **changes}.items() if key not in without}
    return "\n".join(detect(system.shapes(), config, variant=variant).notices)


def test_notices_say_what_was_inferred_and_how_to_override_it() -> None:
    assert "clamp" in notices(QRWKV6_7B) and "radlads_options" in notices(QRWKV6_7B)
    assert "RAD-RWKV7 variant B: ln_x is stored" in notices(QRWKV7_7B) and "--variant" in notices(QRWKV7_7B)
    assert "variant C: no ln_x" in notices(replace(QRWKV7_7B, ln_x=False))
    assert "use_rope" in notices(QRWKV7_7B) and "use_rope" not in notices(QRWKV7_7B, use_rope=True)
    assert "rank decay is 96 by its tensor, although the config says lora_rank_decay 64" in notices(QRWKV6_7B, lora_rank_decay=64)
    assert "nope_in_transformer" in notices(HXA, without=("nope_in_transformer",))
    assert "nope_in_transformer" not in notices(HXA)
    assert "32, 33, 34, 35 are softmax" in notices(HXA, without=("transformer_layers",))
    assert "norm epsilon 1e-06" in notices(QRWKV7_7B, without=("rms_norm_eps",)) and "epsilon" not in notices(QRWKV7_7B)
    assert "family llama: the layout names none" in notices(BY_NAME["HRWKV7-Reka-Flash3-Preview"])
    assert "family seed_oss" in notices(SEED) and "family" not in notices(QRWKV7_7B)
    assert "rotary base 10000" in notices(QRWKV7_7B, without=("rope_theta",))


def test_flags_of_the_config_and_overrides_win() -> None:
    def mixer(system: System, variant: str | None = None, **changes: Any) -> Any:
        return detect(system.shapes(), {**system.config(), **changes}, variant=variant).spec.mixer

    assert mixer(QRWKV7_7B, use_rope=False).rope is False and mixer(QRWKV7_7B).rope is True
    assert mixer(QRWKV6_7B, use_rope=True).rope is True and mixer(QRWKV6_7B).rope is False
    assert mixer(QRWKV7_7B, "A").variant == "A" and mixer(QRWKV7_7B, balance_state=True).variant == "C"
    assert mixer(QRWKV6_7B).clamp == -5.0 and mixer(QRWKV6_7B, radlads_options={"clamp": None}).clamp is None
    assert mixer(QRWKV6_7B, balance_state=False).balance is False
    assert mixer(HXA).kept_rope is False and mixer(HXA, nope_in_transformer=False).kept_rope is True


def test_ablations_show_in_the_tensors() -> None:
    shapes = QRWKV6_7B.shapes()
    without_shift = {name: shape for name, shape in shapes.items() if "time_maa" not in name}
    assert detect(without_shift, QRWKV6_7B.config()).spec.mixer.token_shift is False
    no_gate = {name: shape for name, shape in shapes.items() if ".gate." not in name}
    assert detect(no_gate, QRWKV6_7B.config()).spec.mixer.gate == "none"
    tied = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    config = QRWKV6_7B.config()
    with pytest.raises(RadladsError, match=r"R203.*lm_head.weight is missing.*not tied"):
        detect(tied, config)
    del config["tie_word_embeddings"]
    found = detect(tied, config)
    assert found.spec.tie_embeddings is True and "no lm_head is stored, so the embedding is the head" in "\n".join(found.notices)


KINDS = {(system.kind, system.ln_x, system.family): system for system in SYSTEMS}


@pytest.mark.parametrize("system", [system.small() for system in KINDS.values()], ids=lambda system: system.name)
def test_one_tensor_at_fault_is_the_one_that_is_named(system: System) -> None:
    """Lost, too many, empty or longer along an axis: the spec stays what it was, against which that very tensor is held."""
    shapes, config = system.shapes(), system.config()
    spec = detect(shapes, config).spec
    flags = ("ln_x.weight", "gate.weight", "g1", "time_maa_x", "k_norm.weight", "q_proj.bias", "receptance.bias", "o_proj.bias")
    for layer in (0, spec.L - 1):
        for surplus in (name for tensor in flags if (name := f"model.layers.{layer}.self_attn.{tensor}") not in shapes):
            assert detect({**shapes, surplus: (3, 3)}, config).spec == spec, surplus
    for name, shape in shapes.items():
        lost = {key: value for key, value in shapes.items() if key != name}
        grown = [(*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]) for axis in range(len(shape))]
        for changed in (lost, *({**shapes, name: other} for other in ((), *grown))):
            try:
                assert detect(changed, config).spec == spec, name
            except RadladsError as error:  # the frame, which every size is read from
                sizes = ("hidden_size", "vocab_size", "intermediate_size")
                assert error.code in ("R203", "R204") and any(word in error.why for word in (name, *sizes)), error
                assert name.startswith(("model.embed_tokens", "lm_head", "model.layers.0.mlp.gate_proj")), error


def test_records_of_the_training_code_are_left_out() -> None:
    shapes = {
        **HXA.shapes(),
        "model.layers.0.self_attn.layer_architecture": (),
        "model.layers.0.self_attn.head_size_record": (1,),
    }
    found = detect(shapes, HXA.config())
    assert found.ignored == tuple(name for name in shapes if name not in HXA.shapes())
    assert found.spec == detect(HXA.shapes(), HXA.config()).spec


def value_pair(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """hxa07B and 07C: 07A and a low-rank addition to v."""
    D, _, L, H, _, N, _ = SEED.sizes
    shapes: dict[str, Any] = dict(SEED.shapes())
    for i in range(L):
        if i not in SEED.kept:
            shapes |= {f"model.layers.{i}.self_attn.v1": (D, 48), f"model.layers.{i}.self_attn.v2": (48, H * N)}
    return shapes, {**SEED.config(), "rwkv_architecture": kind}


def test_07b_and_07c_are_told_by_the_config_or_asked() -> None:
    for kind in ("hxa07b", "hxa07c"):
        shapes, config = value_pair(kind)
        spec = detect(shapes, config).spec
        assert spec.recurrent == kind and {n: r.shape for n, r in spec.tensors().items()} == shapes
        del config["rwkv_architecture"]
        with pytest.raises(RadladsError, match=r"R204.*--variant B or --variant C"):
            detect(shapes, config)
        assert detect(shapes, config, variant=kind[-1].upper()).spec.recurrent == kind


REFUSED: dict[str, tuple[System, dict[str, Any], str]] = {
    "experts": (HXA, {"num_experts": 128}, "R205.*mixture of experts"),
    "other layers": (HXA, {"transformer_layers": [1, 2]}, r"R203.*\[1, 2\].*\[32, 33, 34, 35\]"),
    "other mixer": (HXA, {"rwkv_architecture": "hxa07a"}, "R204.*hxa07a.*hxa079"),
    "other type": (QRWKV7_7B, {"model_type": "rwkv6qwen2"}, "R204.*rwkv6.*rwkv7"),
    "unknown type": (QRWKV7_7B, {"model_type": "mamba"}, "R205.*'mamba'"),
    "sizes": (HXA, {"hidden_size": 4095, "num_attention_heads": 24}, "R204.*hidden_size is 4095.*num_heads is 24"),
    "no sizes": (HXA, {"hidden_size": None}, "R204.*hidden_size.*missing"),
    "override": (QRWKV6_7B, {"radlads_options": {"clap": 1}}, "R204.*radlads_options"),
    "override type": (QRWKV6_7B, {"radlads_options": {"rope": 1}}, "R204.*rope cannot be 1"),
}  # fmt: skip


@pytest.mark.parametrize(("system", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(system: System, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RadladsError, match=reason):
        detect(system.shapes(), {**system.config(), **changes})


def test_tensors_alone_do_not_suffice() -> None:
    with pytest.raises(RadladsError, match=r"R204.*head size, norm epsilon.*--config"):
        detect(QRWKV7_7B.shapes(), None)
    with pytest.raises(RadladsError, match=r"R101.*no variants"):
        detect(QRWKV6_7B.shapes(), QRWKV6_7B.config(), variant="A")
    with pytest.raises(RadladsError, match=r"R203.*no tensors named"):
        detect({"x": (1,)}, QRWKV6_7B.config())
    partial = {name: shape for name, shape in QRWKV7_7B.shapes().items() if not name.startswith("model.layers.3.")}
    with pytest.raises(RadladsError, match=r"R203.*layer 3"):
        detect(partial, QRWKV7_7B.config())
    with pytest.raises(RadladsError, match=r"R203.*q_proj"):
        shapes = {name: () if name.endswith("q_proj.weight") else shape for name, shape in QRWKV7_7B.shapes().items()}
        detect(shapes, QRWKV7_7B.config())


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_a_layout_is_written_as_it_is_read(system: System) -> None:
    given = system.config()
    spec = detect(system.shapes(), given).spec
    config, reasons = write_layout(spec, given["model_type"], {})
    assert reasons == [] and detect(system.shapes(), config).spec == spec
    # Every key that was seen in a published file is written, with the value that stands there.
    unread = {"torch_dtype", "use_cache", "eos_token_id", "bos_token_id", "residual_dropout", "attention_dropout", "base_model",
              "initializer_range", "sliding_window", "max_window_layers", "rope_scaling"}  # fmt: skip
    wanted = {key: value for key, value in given.items() if key not in unread}
    wanted["auto_map"] = {**config["auto_map"], **given["auto_map"]}
    assert {key: config[key] for key in wanted} == wanted
    kept, _ = write_layout(spec, given["model_type"], given)
    assert {key: kept[key] for key in given if key in unread and key != "rope_scaling"} == {
        key: given[key] for key in unread if key in given and key != "rope_scaling"
    }
    others = [name for name in NAMES if name != given["model_type"]]
    assert all(write_layout(spec, name, {})[1] for name in others)


UNHELD: dict[str, tuple[System, str, dict[str, Any], str]] = {
    "era A": (QRWKV7_7B, "rwkv7qwen2", {"mixer": {"variant": "A"}}, "mixer.variant A would be read as B"),
    "no clamp": (QRWKV6_7B, "rwkv6qwen2", {"mixer": {"clamp": None}}, "mixer.clamp None would be read as -5.0"),
    "softmax in the middle": (QRWKV7_7B, "rwkv7qwen2", {"mixers": ("rwkv7", "softmax") * 14}, "keeps softmax in layers"),
    "softmax in rwkv6": (QRWKV6_7B, "rwkv6qwen2", {"mixers": ("rwkv6",) * 27 + ("softmax",)}, "it keeps no softmax layers"),
    "wide heads": (QRWKV7_7B, "rwkv7qwen2", {"head_dim": 64}, "together are as wide as the model"),
    "another family": (QRWKV7_7B, "rwkv7qwen2", {"family": "llama"}, "family llama would be read as qwen2"),
}


@pytest.mark.parametrize(("system", "layout", "changes", "reason"), UNHELD.values(), ids=UNHELD)
def test_what_a_layout_cannot_hold_is_a_reason(system: System, layout: str, changes: dict[str, Any], reason: str) -> None:
    spec = detect(system.shapes(), system.config()).spec
    changes = {**changes, **({"mixer": replace(spec.mixer, **changes["mixer"])} if "mixer" in changes else {})}
    assert reason in "; ".join(write_layout(replace(spec, **changes), layout, {})[1])


def test_softmax_in_the_last_layers_is_held_by_rwkv7() -> None:
    spec = replace(detect(QRWKV7_7B.shapes(), QRWKV7_7B.config()).spec, mixers=("rwkv7",) * 26 + ("softmax",) * 2)
    config, reasons = write_layout(spec, "rwkv7qwen2", {})
    assert reasons == [] and config["num_attention_layers"] == 2
