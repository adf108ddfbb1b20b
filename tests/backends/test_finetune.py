"""Adapters and fine-tuning on both backends, beside each other and beside stock mlx-lm and stock peft."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import peft
import pytest
import torch
import transformers

from radlads.adapted import open_adapter, with_adapter
from radlads.adapters import Settings, write_adapter, write_peft
from radlads.backends import open_engine, open_tuner
from radlads.errors import RadladsError
from radlads.folder import open_folder
from radlads.states import model_fingerprint
from radlads.tuning.examples import Batches, Example, collated
from radlads.tuning.settings import Tuning
from radlads.weights_tools.fuse import fuse
from tests.students import tiny_student

BACKENDS = ("torch", "mlx")
IDS = list(range(5, 30))


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """On a CPU, mlx.compile runs a C++ compiler for each piece of a training step, which takes minutes."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """A hybrid of every recurrence."""
    return {arch: tiny_student(tmp_path_factory.mktemp(arch), arch) for arch in ("rwkv7", "rwkv6", "hxa079")}


@pytest.fixture(scope="module")
def student(students, tmp_path_factory):
    """The RAD-RWKV7 hybrid, where the code that it ships may be loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("sys.path", list(sys.path))
        yield students["rwkv7"]


@pytest.fixture(scope="module")
def quantised(student, tmp_path_factory):
    """The same in 4 bits, as stock mlx-lm makes it."""
    path = tmp_path_factory.mktemp("quantised") / "q"
    mlx_lm.convert(str(student.path), str(path), quantize=True, q_bits=4, q_group_size=32, trust_remote_code=True)
    return open_folder(path)


def examples(count=12):
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, count)
    return [Example(rng.integers(3, 300, n).astype(np.int32), rng.random(n) < 0.7) for n in lengths]


def opened(folder, backend, kind="lora", **settings):
    tuning = Tuning(model=str(folder.path), data="d", fine_tune_type=kind, backend=backend, num_layers=-1, **settings)
    return open_tuner(folder, tuning, tuning.adapter(folder.spec.L))


def moved(tensors, seed=1):
    """Every tensor away from where it began: B of a new lora is zero, and so is every gradient that passes it."""
    rng = np.random.default_rng(seed)
    return {name: x + 0.02 * rng.standard_normal(x.shape).astype(np.float32) for name, x in tensors.items()}


def written(folder, path, kind, scale=2.0):
    """An adapter with random tensors on the disk, and the tensors."""
    tuner = opened(folder, "torch", kind, lora_parameters={"scale": scale})
    tensors = moved(tuner.tensors())
    write_adapter(path, tensors, tuner.settings, folder.spec, fingerprint=model_fingerprint(folder))
    return tensors


def logits(folder, backend, ids=IDS):
    engine = open_engine(folder, backend, dtype="float32")
    return engine.feed(engine.start(), ids)[0]


def loaded(path, adapter=None):
    """Logits of stock mlx-lm."""
    extra = {} if adapter is None else {"adapter_path": str(adapter)}
    model, _ = mlx_lm.load(str(path), trust_remote_code=True, tokenizer_config={"trust_remote_code": True}, **extra)
    return np.array(model(mx.array([IDS]))[0, -1].astype(mx.float32))


def close(found, wanted, tolerance):
    worst = np.abs(found - wanted).max()
    assert worst <= tolerance, f"{worst} is more than {tolerance}"


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "state"])
@pytest.mark.parametrize("arch", ["rwkv7", "rwkv6", "hxa079"])
def test_gradients_are_equal_on_both_backends(students, arch, kind):
    batch = collated(examples(3))
    tuners = [opened(students[arch], backend, kind, lora_parameters={"scale": 2.0}) for backend in BACKENDS]
    tensors = moved(tuners[0].tensors())
    for tuner in tuners:
        tuner.load(tensors)
    ours, theirs = (tuner.gradients(batch) for tuner in tuners)
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name in ours:
        assert ours[name].shape == tensors[name].shape and np.abs(ours[name]).max() > 0, name
        close(theirs[name] / np.abs(ours[name]).max(), ours[name] / np.abs(ours[name]).max(), 1e-4)
    assert tuners[0].loss(batch).mean == pytest.approx(tuners[1].loss(batch).mean, abs=1e-5)


def test_the_gradient_of_the_state_is_that_of_differences(student):
    batch = collated(examples(2))
    tuner = opened(student, "torch", "state", dtype="float32")
    tensors = moved(tuner.tensors())
    tuner.load(tensors)
    gradient = tuner.gradients(batch)
    name = "layers.2.wkv"
    direction = np.sign(gradient[name])
    losses = []
    for step in (0.02, -0.02):
        tuner.load({name: tensors[name] + np.float32(step) * direction})
        losses.append(tuner.loss(batch).mean)
    assert (losses[0] - losses[1]) / 0.04 == pytest.approx(float(np.abs(gradient[name]).sum()), rel=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_last_layers_and_the_named_modules_are_trained(student, backend):
    tuning = Tuning(model="m", data="d", backend=backend, num_layers=1, lora_parameters={"keys": ["self_attn.q_proj"]})
    tuner = open_tuner(student, tuning, tuning.adapter(student.spec.L))
    assert set(tuner.tensors()) == {f"model.layers.2.self_attn.q_proj.{part}" for part in ("lora_a", "lora_b")}
    wrong = replace(tuning.adapter(student.spec.L), keys=("self_attn.w1",))
    with pytest.raises(RadladsError, match=r"self_attn\.w1.*Use some of: .*self_attn\.v_proj"):
        open_tuner(student, tuning, wrong)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_both_backends_learn_the_same(student, optimizer):
    batches = Batches(examples(), 3, 0, "data")
    settings = {"optimizer": optimizer, "optimizer_config": {"sgd": {"momentum": 0.9}, "adamw": {"weight_decay": 0.1}}}
    losses = {}
    for backend in BACKENDS:
        tuner = opened(student, backend, **settings)
        losses[backend] = [tuner.update([batches.at(place)], 1e-3, 0)[0].mean for place in range(4)]
    close(np.array(losses["torch"]), np.array(losses["mlx"]), 1e-4)
    assert losses["torch"][-1] != pytest.approx(losses["torch"][0], abs=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation_and_recomputation_change_no_gradient(student, backend):
    batches = Batches(examples(6), 3, 0, "data")
    both = [batches.at(0), batches.at(1)]
    for kind in ("state", "lora"):
        plain, again = (opened(student, backend, kind, optimizer="sgd", grad_checkpoint=flag) for flag in (False, True))
        for tuner in (plain, again):
            tuner.load(moved(tuner.tensors()))
        before, grads = plain.tensors(), [plain.gradients(batch) for batch in both]
        for name, gradient in again.gradients(both[0]).items():
            close(gradient, grads[0][name], 1e-6)
            assert np.abs(gradient).max() > 1e-5
    plain.update(both, 0.1, 0)
    for name, x in plain.tensors().items():
        close(x, before[name] - 0.05 * (grads[0][name] + grads[1][name]), 1e-5)


def test_a_quantised_model_learns_on_mlx_and_is_refused_elsewhere(quantised):
    batch = collated(examples(3))
    for kind in ("lora", "dora", "state"):
        tuner = opened(quantised, "mlx", kind)
        losses = [tuner.update([batch], 0.02, 0)[0].mean for _ in range(4)]
        assert losses[-1] < losses[0]
    with pytest.raises(RadladsError, match=r"R101.*quantised weights cannot be trained"):
        opened(quantised, "mlx", "full")
    with pytest.raises(RadladsError, match="--backend mlx"):
        opened(quantised, "torch")


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_an_adapter_is_the_same_here_in_stock_mlx_lm_and_in_stock_peft(student, tmp_path, kind):
    tensors = written(student, tmp_path / "a", kind)
    adapted = with_adapter(student, tmp_path / "a")
    found = logits(adapted, "torch")
    assert np.abs(found - logits(student, "torch")).max() > 0.05
    close(logits(adapted, "mlx"), found, 1e-4)
    close(loaded(student.path, tmp_path / "a"), found, 1e-4)
    settings = Settings(kind, scale=2.0)
    if kind == "full":
        with pytest.raises(RadladsError, match=r"R101.*peft has no adapter"):
            write_peft(tmp_path / "p", tensors, settings, str(student.path))
        return
    write_peft(tmp_path / "p", tensors, settings, str(student.path))
    stock = transformers.AutoModelForCausalLM.from_pretrained(student.path, trust_remote_code=True, dtype=torch.float32)
    with_peft = peft.PeftModel.from_pretrained(stock, tmp_path / "p")
    with torch.no_grad():
        close(with_peft(torch.tensor([IDS])).logits[0, -1].numpy(), found, 1e-4)
    again = open_adapter(tmp_path / "p", student)
    assert (again.kind, again.rank, again.scale) == (kind, 8, 2.0)
    assert again.tensors().keys() == tensors.keys()
    assert all(np.array_equal(x, tensors[name]) for name, x in again.tensors().items())
    close(logits(with_adapter(student, tmp_path / "p"), "mlx"), found, 1e-4)


def test_what_stock_peft_saves_is_read(student, tmp_path):
    stock = transformers.AutoModelForCausalLM.from_pretrained(student.path, trust_remote_code=True, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2],
        layers_pattern="layers", task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with_peft = peft.get_peft_model(stock, config)
    with_peft.save_pretrained(tmp_path / "p")
    adapted = with_adapter(student, tmp_path / "p")
    assert adapted.adapter.kind == "dora" and adapted.adapter.scale == pytest.approx(3.0)
    with torch.no_grad():
        wanted = with_peft(torch.tensor([IDS])).logits[0, -1].numpy()
    for backend in BACKENDS:
        close(logits(adapted, backend), wanted, 1e-4)
    write_adapter(tmp_path / "m", adapted.adapter.tensors(), Settings("dora", 3, 4, 3.0), student.spec, fingerprint=None)
    close(loaded(student.path, tmp_path / "m"), wanted, 1e-4)


@pytest.mark.parametrize("arch", ["rwkv7", "rwkv6"])
def test_a_trained_state_is_where_every_sequence_begins(students, tmp_path, arch):
    folder = students[arch]
    written(folder, tmp_path / "s", "state")
    adapted = with_adapter(folder, tmp_path / "s")
    found = {}
    for backend in BACKENDS:
        engine = open_engine(adapted, backend, dtype="float32")
        first, state = engine.feed(engine.start(), IDS[:7])
        found[backend], _ = engine.feed(state, IDS[7:])
        assert np.abs(first - logits(folder, backend, IDS[:7])).max() > 1e-3
        scores = engine.score([IDS, IDS[:9]])
        steps, state = [], engine.start()
        for token, wanted in pairwise(IDS[:9]):
            rows, (state,) = engine.feed_many([state], [token])
            steps.append(rows[0][wanted] - np.logaddexp.reduce(rows[0].astype(np.float64)))
        close(scores[1].logprobs, np.array(steps), 1e-4)
        close(scores[0].logprobs[:8], np.array(steps), 1e-4)
    close(found["torch"], found["mlx"], 1e-4)
    assert model_fingerprint(adapted) != model_fingerprint(folder)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_fuse_gives_the_model_that_the_adapter_makes(student, tmp_path, kind):
    written(student, tmp_path / "a", kind)
    done = fuse(student.path, tmp_path / "a", tmp_path / "fused", say=print)
    folder = open_folder(done.path)
    close(logits(folder, "torch"), logits(with_adapter(student, tmp_path / "a"), "torch"), 1e-4)
    assert folder.manifest["history"][-2]["kind"] == "fuse" and folder.manifest["stage"] == 0
    close(loaded(done.path), logits(folder, "torch"), 1e-4)
    assert not fuse(student.path, tmp_path / "a", tmp_path / "fused", say=print).written


def test_a_quantised_model_is_fused_as_stock_mlx_lm_does_it(student, quantised, tmp_path, monkeypatch):
    import mlx_lm.fuse

    written(student, tmp_path / "a", "lora")
    told = []
    for name, more in (("q", {}), ("f", {"dequantize": True})):
        fuse(quantised.path, tmp_path / "a", tmp_path / f"ours-{name}", say=told.append, **more)
        words = ["--model", quantised.path, "--adapter-path", tmp_path / "a", "--save-path", tmp_path / f"stock-{name}"]
        words += ["--dequantize"] if more else []
        monkeypatch.setattr("sys.argv", ["mlx_lm.fuse", *map(str, words), "--trust-remote-code"])
        mlx_lm.fuse.main()
        close(loaded(tmp_path / f"ours-{name}"), loaded(tmp_path / f"stock-{name}"), 1e-4)
    assert open_folder(tmp_path / "ours-q").quantised.keys() == quantised.quantised.keys()
    assert not open_folder(tmp_path / "ours-f").quantised
    # The adapter was trained on other weights, which is usual for a quantised model and told.
    assert any("trained on other weights" in text for text in told)
    with pytest.raises(RadladsError, match=r"R101.*not quantised"):
        fuse(student.path, tmp_path / "a", tmp_path / "x", dequantize=True, say=print)


def test_a_state_cannot_be_fused_nor_used_with_another_model(students, tmp_path):
    folder = students["rwkv7"]
    written(folder, tmp_path / "s", "state")
    with pytest.raises(RadladsError, match=r"R101.*no part of the weights"):
        fuse(folder.path, tmp_path / "s", tmp_path / "x", say=print)
    with pytest.raises(RadladsError, match=r"R203.*shift is missing"):
        with_adapter(students["rwkv6"], tmp_path / "s")
    other = tiny_student(tmp_path / "other", "rwkv7", dtype="BF16")
    with pytest.raises(RadladsError, match=r"R304.*made with another model"):
        with_adapter(other, tmp_path / "s")
    assert not Path(tmp_path / "x").exists()
