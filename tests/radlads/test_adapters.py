import json

import numpy as np
import pytest

from radlads.adapted import open_adapter, rewrite_adapter, with_adapter
from radlads.adapters import CONFIG, WEIGHTS, Settings, first_values, state_shapes, write_adapter, write_tensors
from radlads.errors import RadladsError
from radlads.folder import open_folder
from radlads.states import model_fingerprint
from tests.models import tiny_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return open_folder(tiny_teacher(tmp_path_factory.mktemp("adapters") / "model"))


def lora(folder, path, **changes):
    settings = Settings("lora", 2, 4, 3.0, keys=("self_attn.q_proj", "mlp.down_proj"))
    tensors = first_values(folder.spec, settings, 1)
    write_adapter(path, tensors, settings, folder.spec, fingerprint=model_fingerprint(folder))
    if changes:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**config, **changes}))
    return tensors


def test_an_adapter_comes_back_and_its_config_is_mlx_lms(folder, tmp_path):
    tensors = lora(folder, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 2
    keys = ["mlp.down_proj", "self_attn.q_proj"]
    assert config["lora_parameters"] == {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": keys}
    found = with_adapter(folder, tmp_path)
    assert all(np.array_equal(x, tensors[name]) for name, x in found.adapter.tensors().items())
    assert found.notices == () and model_fingerprint(found) != model_fingerprint(folder)


def test_from_one_format_to_the_other_and_back_not_a_bit_changes(folder, tmp_path):
    lora(folder, tmp_path / "a")
    rewrite_adapter(tmp_path / "a", tmp_path / "p", "hf", folder)
    rewrite_adapter(tmp_path / "p", tmp_path / "b", "mlx", folder)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    with pytest.raises(RadladsError, match=r"R401.*the folder exists"):
        rewrite_adapter(tmp_path / "a", tmp_path / "p", "hf", folder)


def broken(folder, path, change):
    """The adapter with its tensors changed, without the hash that would tell."""
    tensors = lora(folder, path)
    change(tensors)
    write_tensors(path / WEIGHTS, tensors, "F32")
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "radlads": {}}))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.lora_b"), r"R203.*q_proj\.lora_b is missing"),
        (lambda t: t.update({f"{Q}.lora_a": np.zeros((64, 5), np.float32)}), r"R203.*lora_a is \[64, 5\].*needs \[64, 4\]"),
        (lambda t: t.update({"model.layers.7.mlp.up_proj.lora_a": np.zeros((1, 1), np.float32)}), "R203.*unknown to the model"),
        (lambda t: t.update({"model.embed_tokens.lora_a": np.zeros((1, 1), np.float32)}), "R203.*unknown to the model"),
        (lambda t: t[f"{Q}.lora_a"].fill(np.nan), r"R207.*NaN or infinity"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(folder, tmp_path, change, words):
    broken(folder, tmp_path, change)
    with pytest.raises(RadladsError, match=words):
        open_adapter(tmp_path, folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fine_tune_type": "lokr"}, "R204.*'lokr' is none of"),
        ({"lora_parameters": {"rank": 4}}, "R204.*scale"),
        ({"lora_parameters": {"rank": True, "scale": 1}}, "R204.*rank"),
        ({"lora_parameters": None}, "R204.*rank"),
        ({"radlads": {"schema": 9}}, "R204.*schema is 9.*Update radlads"),
        ({"peft_type": "LOHA"}, "R205.*LOHA"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "all"}, "R205.*bias is set"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(folder, tmp_path, changes, words):
    lora(folder, tmp_path, **changes)
    with pytest.raises(RadladsError, match=words):
        open_adapter(tmp_path, folder)


def test_damage_is_seen(folder, tmp_path):
    lora(folder, tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(RadladsError, match=r"R304.*damaged"):
        open_adapter(tmp_path, folder)
    (tmp_path / WEIGHTS).write_bytes(data[:-7])
    with pytest.raises(RadladsError, match=r"R202.*cut"):
        open_adapter(tmp_path, folder)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(RadladsError, match=r"R201"):
        open_adapter(tmp_path, folder)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(RadladsError, match=r"R204"):
        open_adapter(tmp_path, folder)
    with pytest.raises(RadladsError, match=r"R201.*no such folder"):
        open_adapter(tmp_path / "nowhere", folder)


def test_a_state_has_the_shapes_of_the_spec(folder):
    spec = folder.spec.as_student("rwkv6", (1,))
    shapes = state_shapes(spec)
    assert shapes == {"layers.0.wkv": (1, 4, 32, 32), "layers.0.shift": (1, 1, 64)}
    assert all(not x.any() for x in first_values(spec, Settings("state"), 0).values())
