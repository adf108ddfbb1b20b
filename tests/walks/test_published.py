"""Each published system from its own file layout to a running, talking, training model; judged by tests/published.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from radlads.backends import open_engine
from radlads.backends.torch.load import load_model, new_model
from radlads.backends.torch.model import Model
from radlads.backends.torch.objectives import objective
from radlads.backends.torch.optim import Optimizer, trainable
from radlads.errors import RadladsError
from radlads.families.published import detect
from radlads.files import sha256
from radlads.folder import ModelFolder, open_folder
from radlads.oracle import oracle_logits
from radlads.recipe import Stage
from radlads.sampling import Sampling
from radlads.session import Session
from radlads.tensors import read_float32, read_raw
from radlads.tokenizer import Tokenizer
from radlads.verify import check_provenance, check_tokenizer
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats.format import Reading, Writing
from tests.models import CHAT_TEMPLATE, tiny_tokenizer
from tests.published import QRWKV6_7B, QRWKV7_7B, SYSTEMS, System, reference_logits

HXA = next(system for system in SYSTEMS if system.name == "HRWKV7-hxa079-Qwen3-8B")
TOKENS = np.random.default_rng(1).integers(0, 512, 41)


def stored(system: System) -> dict[str, torch.Tensor]:
    """bf16 weights; what layer 0 of RAD-RWKV7 never reads is uninitialised memory, as in the published files."""
    weights = {name: torch.from_numpy(value).bfloat16() for name, value in system.weights().items()}
    if system.kind == "rwkv7":
        for name in ("v0", "v1", "v2"):
            weights[f"model.layers.0.self_attn.{name}"].fill_(float("nan"))
    return weights


def write(path: Path, system: System, weights: dict[str, torch.Tensor]) -> Path:
    """A folder as it lies on the hub: two shards and their index, config, tokenizer, and code that must not be run."""
    path.mkdir(parents=True)
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    (path / "config.json").write_text(json.dumps(system.config()))
    (path / "tokenizer.json").write_text(tiny_tokenizer(300))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (path / "modeling_x.py").write_text("raise RuntimeError('code of a folder was run')\n")
    return path


@pytest.fixture(scope="module", params=SYSTEMS, ids=lambda system: system.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[System, ModelFolder, np.ndarray]:
    """The small system, its opened folder, and the logits that it must give."""
    system: System = request.param.small()
    weights = stored(system)
    folder = open_folder(write(tmp_path_factory.mktemp("published") / "model", system, weights))
    wanted = reference_logits(system, {name: value.float().numpy() for name, value in weights.items()}, TOKENS)
    return system, folder, wanted


Case = tuple[System, ModelFolder, np.ndarray]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def test_folder_opens_with_what_its_tensors_show(case: Case) -> None:
    system, folder, _ = case
    ranks = {name.removesuffix("_mix"): width for name, width in system.ranks.items()}
    assert {name: width for name, width in vars(folder.spec.ranks).items() if width} == ranks
    assert folder.spec.recurrent == system.kind and folder.spec.kept_layers == system.kept
    assert folder.dtype == "BF16" and folder.stage is None and folder.notices
    names = {f"model.layers.0.self_attn.v{i}" for i in range(3)} if system.kind == "rwkv7" else set()
    assert set(folder.check_finite()) == names


def test_its_layout_is_written_as_it_came(case: Case, tmp_path: Path) -> None:
    """From the published folder through every format that holds it and back to its own layout, every tensor to the bit."""
    system, folder, _ = case
    said: list[str] = []
    layout, place = system.config()["model_type"], folder.path
    for target in ("hf", "mlx", "pth", *(("gguf",) if system.kind == "rwkv6" else ())):
        place = convert(place, tmp_path / target, target, say=said.append).path
    convert(place, tmp_path / "back", "hf", writing=Writing(layout=layout), say=said.append)
    back = open_folder(tmp_path / "back")
    stated = system.config().get("base_model", "")
    known = {"name": stated.rpartition("/")[2], "repository": stated} if stated else None
    assert back.manifest is not None and back.manifest.get("teacher") == known
    assert back.spec == folder.spec and back.config["model_type"] == layout and "auto_map" in back.config
    assert not list(back.path.glob("*_radlads.py")) and any(f"modeling_{layout}.py" in line for line in said)
    for name, entry in folder.weights.items():
        assert (entry.dtype, entry.shape) == (back.weights[name].dtype, back.weights[name].shape)
        assert read_raw(entry).tobytes() == read_raw(back.weights[name]).tobytes(), name
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (back.path / name).read_bytes() == (folder.path / name).read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("system", [QRWKV6_7B, QRWKV7_7B, HXA], ids=lambda system: system.kind)
def test_a_raw_pth_with_its_teachers_config_is_the_same_model(system: System, tmp_path: Path) -> None:
    """As in radlads-7b-various, and with OpenMOSE's names: nothing but torch.save, and the teacher's folder."""
    small = system.small()
    weights = stored(small)
    names = dict(zip(weights, map(openmose, weights), strict=True)) if small.hxa else {name: name for name in weights}
    path = tmp_path / "L3-D64-qwen2-3.pth"
    torch.save({names[name]: value for name, value in weights.items()}, path)
    teacher = tmp_path / "models--them--Teacher" / "snapshots" / ("c" * 40)
    teacher.mkdir(parents=True)
    (teacher / "tokenizer.json").write_text(tiny_tokenizer(300))
    (teacher / "LICENSE").write_text("Apache License, Version 2.0")
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "vocab_size", "rms_norm_eps", "rope_theta")  # fmt: skip
    sizes = {key: value for key, value in small.config().items() if key in keys}
    (teacher / "config.json").write_text(json.dumps({**sizes, "model_type": small.family}))
    said: list[str] = []
    reading = Reading(config=str(teacher))
    convert(path, tmp_path / "folder", "hf", reading=reading, say=said.append)
    folder = open_folder(tmp_path / "folder")
    assert folder.spec.recurrent == small.kind and folder.spec.kept_layers == small.kept and folder.stage == 2
    assert any("ranks from shapes" in line for line in said)
    assert folder.manifest is not None and folder.manifest["teacher"] == {
        "name": "Teacher",
        "repository": "them/Teacher",
        "revision": "c" * 40,
        "family": small.family,
        "license": {"license": "apache-2.0"},
        "files": {name: sha256(teacher / name) for name in ("config.json", "tokenizer.json")},
    }
    assert check_provenance(folder).status == "passed" and check_tokenizer(folder, Tokenizer(folder.path)).status == "passed"
    arrays = {name: value.float().numpy() for name, value in weights.items()}
    found = load_model(folder, dtype="float32")(torch.from_numpy(TOKENS)[None])[0][0].numpy()
    assert relative(found, reference_logits(small, arrays, TOKENS)) <= 1e-5


def openmose(name: str) -> str:
    """The name of a tensor in OpenMOSE's files, by the published map."""
    for ours, theirs in (("model.layers.", "blocks."), ("self_attn.", "att."), ("mlp.", "ffn."), ("_proj.", "."),
                         ("post_attention_layernorm", "ln2"), ("input_layernorm", "ln1"), ("model.norm", "ln_out"),
                         ("model.embed_tokens", "emb"), ("lm_head", "head"), ("r_norm", "ln_r"), ("q_norm", "ln_r"),
                         ("k_norm", "ln_k")):  # fmt: skip
        if ours != "_proj." or ".ffn." in name:
            name = name.replace(ours, theirs)
    return name


def test_the_oracle_equals_the_published_equations(case: Case) -> None:
    _, folder, wanted = case
    weights = {name: read_float32(entry).astype(np.float64) for name, entry in folder.weights.items()}
    assert relative(oracle_logits(folder.spec, weights, TOKENS), wanted) <= 1e-10


@torch.no_grad()
def test_torch_equals_the_published_equations(case: Case) -> None:
    _, folder, wanted = case
    model = load_model(folder, dtype="float32")
    tokens = torch.from_numpy(TOKENS)[None]
    assert relative(model(tokens)[0][0].numpy(), wanted) <= 1e-5
    state, parts = None, []
    for a, b in ((0, 1), (1, 20), (20, 21), (21, 41)):
        logits, state = model(tokens[:, a:b], state)
        parts.append(logits[0].numpy())
    assert relative(np.concatenate(parts), wanted) <= 1e-5


def test_both_backends_chat_alike(case: Case) -> None:
    _, folder, wanted = case
    said = []
    for name in ("torch", "mlx"):
        engine = open_engine(folder, backend=name, dtype="float32")
        logits, state = engine.feed(engine.start(), TOKENS[:30].tolist())
        assert relative(logits, wanted[29]) <= 1e-5
        logits, _ = engine.feed(state, TOKENS[30:].tolist())
        assert relative(logits, wanted[-1]) <= 1e-5
        session = Session(engine, Tokenizer(folder.path, vocab_size=folder.spec.V), Sampling(), 12)
        said.append(["".join(session.say(text)) for text in ("Once upon a time", "and then?")])
    assert said[0] == said[1] and any(said[0])


def test_one_step_of_each_stage_lowers_its_loss(case: Case) -> None:
    _, folder, _ = case
    teacher = new_model(folder.spec.as_teacher(), seed=0)
    sample = torch.from_numpy(np.random.default_rng(2).integers(0, 512, (2, 33)))
    for kind in ("align", "distill", "lm"):
        student = load_model(folder, dtype="float32")
        stage = Stage(kind=kind, tokens=128, seq_len=32, batch_size=2, lr=1e-3, warmup_steps=0)
        optimizer = Optimizer(trainable(student, stage.train), stage)
        before = objective(stage, student, teacher, sample).loss
        before.backward()
        norm = optimizer.step(0).norm
        assert torch.isfinite(norm)
        with torch.no_grad():
            assert objective(stage, student, teacher, sample).loss < before


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_full_size_on_the_meta_device(system: System) -> None:
    with torch.device("meta"):
        model = Model(detect(system.shapes(), system.config()).spec)
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == system.shapes()
    assert (len(found), sum(value.numel() for value in model.state_dict().values())) == system.facts[:2]


def rewritten(path: Path, system: System, **options: object) -> ModelFolder:
    return open_folder(write(path, system, stored(system)), **options)  # type: ignore[arg-type]


@torch.no_grad()
def test_era_a_is_chosen_by_hand(tmp_path: Path) -> None:
    system = QRWKV7_7B.small()
    folder = rewritten(tmp_path / "a", system, variant="A")
    weights = {name: value.float().numpy() for name, value in stored(system).items()}
    found = load_model(folder, dtype="float32")(torch.from_numpy(TOKENS)[None])[0][0].numpy()
    assert relative(found, reference_logits(system, weights, TOKENS, variant="A")) <= 1e-5
    assert relative(found, reference_logits(system, weights, TOKENS)) > 1e-2


@torch.no_grad()
def test_clamp_of_rwkv6_is_on_and_can_be_turned_off(tmp_path: Path) -> None:
    system = QRWKV6_7B.small()
    weights = stored(system)
    for name in weights:
        if name.endswith("time_decay"):
            weights[name] += 2.0  # beyond ln 5, where the clamp is felt
    path = write(tmp_path / "m", system, weights)
    other = tmp_path / "config.json"
    other.write_text(json.dumps({**system.config(), "radlads_options": {"clamp": None}}))
    arrays = {name: value.float().numpy() for name, value in weights.items()}
    wanted = {clamp: reference_logits(system, arrays, TOKENS, clamp=clamp) for clamp in (-5.0, None)}
    assert relative(wanted[-5.0], wanted[None]) > 1e-4
    for clamp, config in ((-5.0, None), (None, other)):
        model = load_model(open_folder(path, config_from=config), dtype="float32")
        assert relative(model(torch.from_numpy(TOKENS)[None])[0][0].numpy(), wanted[clamp]) <= 1e-5


def test_all_faults_of_the_tensors_are_named_at_once(tmp_path: Path) -> None:
    system = QRWKV7_7B.small()
    weights = stored(system)
    del weights["model.layers.1.self_attn.w2"]
    weights["model.layers.2.self_attn.a0"] = torch.zeros(1, 1, 7).bfloat16()
    weights["model.layers.2.self_attn.surplus"] = torch.zeros(3).bfloat16()
    with pytest.raises(RadladsError, match=r"R203.*3 faults.*w2 is missing.*surplus is unknown.*a0 is \[1, 1, 7\]"):
        open_folder(write(tmp_path / "m", system, weights))
    with pytest.raises(RadladsError, match=r"R101.*--variant"):
        rewritten(tmp_path / "n", QRWKV6_7B.small(), variant="B")
    (tmp_path / "n" / "config.json").write_text(json.dumps({**system.config(), "num_experts": 8}))
    with pytest.raises(RadladsError, match=r"R205.*mixture of experts"):
        open_folder(tmp_path / "n")


def test_records_of_the_training_code_do_not_disturb(tmp_path: Path) -> None:
    system = next(s for s in SYSTEMS if s.kind == "hxa079").small()
    weights = stored(system)
    place = "model.layers.0.self_attn."
    weights |= {f"{place}layer_architecture": torch.tensor(78.0), f"{place}head_size_record": torch.tensor(24.0)}
    folder = open_folder(write(tmp_path / "m", system, weights))
    assert set(folder.weights) == set(system.shapes()) and any("left out" in notice for notice in folder.notices)
