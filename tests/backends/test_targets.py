"""A teacher's targets in files: what they hold, training from them beside training from the teacher, kills and wrong uses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from radlads.backends.torch.load import load_model
from radlads.backends.torch.losses import TeacherHead, TopK, distillation_loss
from radlads.backends.torch.objectives import unpack
from radlads.backends.torch.parallel import Task
from radlads.backends.torch.targets import make_targets
from radlads.backends.torch.trainer import run_stage
from radlads.data import targets as module
from radlads.data.prepare import prepare
from radlads.data.samples import Corpus
from radlads.data.store import TokenStore
from radlads.data.targets import TargetCache, Targets, check_targets
from radlads.errors import RadladsError
from radlads.folder import ModelFolder, open_folder
from radlads.recipe import Recipe, Stage
from radlads.runs import begin_run
from radlads.states import model_fingerprint
from tests.backends.test_torch_model import model_of, random_weights
from tests.backends.test_training import Letters
from tests.models import tiny_teacher

SEQ, K = 16, 12


@pytest.fixture
def teacher(tmp_path: Path) -> ModelFolder:
    return open_folder(tiny_teacher(tmp_path / "teacher", "qwen3", tie_embeddings=True))


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Documents of 11 to 60 tokens."""
    lines = ("the quick brown fox jumps over the lazy dog. "[: 10 + 7 * n % 36] + "<|endoftext|>" for n in range(60))
    (tmp_path / "a.txt").write_text("".join(lines))
    return prepare([tmp_path / "a.txt"], Letters(), tmp_path / "store", eos_id=0)


def stage(**more: Any) -> Stage:
    values = {"kind": "distill", "tokens": 320, "seq_len": SEQ, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0}
    return Stage(**{**values, **more})


@pytest.mark.parametrize("packing", ["stream", "reset", "document"])
def test_targets_are_what_the_teacher_predicts(
    teacher: ModelFolder, store: TokenStore, tmp_path: Path, packing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 5 * SEQ)  # so that shards end inside documents
    options = {"k": K, "seq_len": SEQ, "packing": packing, "temperature": 2.0, "batch_size": 3}
    make_targets(teacher, store, tmp_path / "cache", **options)
    of = stage(packing=packing, temperature=2.0)
    samples = Corpus.of(store).samples(SEQ, 7, packing)
    found = Targets(samples, [tmp_path / "cache"], of).batch(3, 6)
    sample = unpack(torch.from_numpy(samples.batch(3, 6)), packing)
    model = load_model(teacher)
    with torch.no_grad():
        hidden, _ = model.model(sample.tokens, cu_seqlens=sample.cu_seqlens)
        log_p = ((hidden @ model.head.T).double() / 2).log_softmax(-1).reshape(6, SEQ, -1)
    real = (sample.labels.reshape(6, SEQ) != -100).numpy() if packing == "document" else np.ones((6, SEQ), bool)
    wanted = log_p.topk(K).values.numpy()
    assert np.abs(found.log_p - wanted)[real].max() < 2e-3
    given = np.take_along_axis(log_p.numpy(), found.ids, -1)
    assert np.abs(found.log_p - given)[real].max() < 2e-3
    mass = np.exp(found.log_p.astype(float)).sum(-1) + np.exp(found.log_tail.astype(float))
    assert np.abs(mass - 1).max() < 1e-6
    tails = 1 - np.exp(wanted).sum(-1)
    header = TargetCache(tmp_path / "cache").header
    assert len(header["shards"]) > 5 and header["most_tail"] >= tails[real].max() - 1e-3
    assert 0 < header["mean_tail"] < header["most_tail"] <= 1


def test_gradients_are_within_the_bound_that_is_printed(teacher: ModelFolder, store: TokenStore, tmp_path: Path) -> None:
    """The L1 distance of the logits' gradients from the whole teacher's is at most twice the mass of the tail."""
    make_targets(teacher, store, tmp_path / "cache", k=K, seq_len=SEQ)
    samples = Corpus.of(store).samples(SEQ, 7)
    rows = Targets(samples, [tmp_path / "cache"], stage()).batch(0, 4)
    top = TopK(*(torch.from_numpy(x).flatten(0, 1) for x in rows))
    model = load_model(teacher)
    tokens, labels, *_ = unpack(torch.from_numpy(samples.batch(0, 4)))
    with torch.no_grad():
        states = model.model(tokens)[0].flatten(0, 1)
    V = len(model.head)
    logits = torch.randn(len(states), V, requires_grad=True)
    eye = torch.eye(V)
    grads = []
    for target in (TeacherHead(states, model.head.detach()), top):
        loss = distillation_loss(logits, eye, target, labels.flatten(), divisor=1)
        grads.append(torch.autograd.grad(loss, logits)[0])
    off = (grads[0] - grads[1]).abs().sum(1)
    tails = top.log_tail.exp()
    assert (off <= 2 * tails + 5e-3).all() and off.mean() > 0.1 * tails.mean()


def train(folder: Path, store: TokenStore, teacher: Any, caches: list[Path], **more: Any) -> list[float]:
    student = model_of(teacher.spec.as_student("rwkv7"), random_weights(teacher.spec.as_student("rwkv7")))
    values = stage(micro_batch=2, **more).model_dump()
    data = {"train": ["a.txt"], "valid": ["a.txt"], "teacher_cache": [str(path) for path in caches]}
    wanted = Recipe(name="test", teacher="t", data=data, stages=[values])
    live = None if caches else load_model(teacher)
    with begin_run(folder, wanted) as run:
        run_stage(wanted.stages[0], Task(wanted.stages[0], student, live), Corpus.of(store), run, lambda p: None)
        return [r["loss"] for r in run.metrics() if r["kind"] == "train"]


def test_training_from_nearly_all_of_the_vocabulary_is_training_from_the_teacher(
    teacher: ModelFolder, store: TokenStore, tmp_path: Path
) -> None:
    live = train(tmp_path / "live", store, teacher, [])
    found = {}
    for k in (teacher.spec.V - 1, K):
        make_targets(teacher, store, tmp_path / f"cache-{k}", k=k, seq_len=SEQ)
        found[k] = train(tmp_path / f"run-{k}", store, teacher, [tmp_path / f"cache-{k}"])
    assert found[teacher.spec.V - 1] == pytest.approx(live, rel=2e-3)
    assert 0 < found[K][0] < live[0]  # the divergence inside the tail is left out


def test_a_killed_call_goes_on_and_a_finished_one_is_used(
    teacher: ModelFolder, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 10 * SEQ)
    made = []
    write = module.write_shard

    def counted(path: Path, *rest: Any) -> dict[str, Any]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        return write(path, *rest)

    monkeypatch.setattr(module, "write_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        make_targets(teacher, store, tmp_path / "cache", k=K, seq_len=SEQ)
    assert not (tmp_path / "cache").exists()
    made[:] = made[:0]
    monkeypatch.setattr(module, "write_shard", lambda *a: made.append(a[0].name) or write(*a))
    cache = make_targets(teacher, store, tmp_path / "cache", k=K, seq_len=SEQ)
    assert len(made) == len(cache.header["shards"]) - 2
    made.clear()
    make_targets(teacher, store, tmp_path / "cache", k=K, seq_len=SEQ)
    assert not made
    whole = make_targets(teacher, store, tmp_path / "again", k=K, seq_len=SEQ)
    assert [s["sha256"] for s in whole.header["shards"]] == [s["sha256"] for s in cache.header["shards"]]


def test_what_does_not_fit_is_one_error(teacher: ModelFolder, store: TokenStore, tmp_path: Path) -> None:
    cache = make_targets(teacher, store, tmp_path / "cache", k=K, seq_len=SEQ)
    check_targets(cache, stage(), model_fingerprint(teacher))
    for wrong in (stage(seq_len=8), stage(packing="reset"), stage(temperature=1.5)):
        with pytest.raises(RadladsError, match=r"R102.*it was made with"):
            check_targets(cache, wrong)
    with pytest.raises(RadladsError, match=r"R102.*another teacher"):
        check_targets(cache, stage(), "other")
    (tmp_path / "b.txt").write_text("other text " * 40)
    other = prepare([tmp_path / "b.txt"], Letters(), tmp_path / "b", eos_id=None)
    with pytest.raises(RadladsError, match=r"R102.*names no cache of this store"):
        Targets(Corpus.of(other).samples(SEQ, 1), [tmp_path / "cache"], stage())
    with pytest.raises(RadladsError, match=r"R101.*tokens"):
        make_targets(teacher, store, tmp_path / "c", k=10**6, seq_len=SEQ)
    shard = tmp_path / "cache" / cache.header["shards"][0]["file"]
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-8])
    with pytest.raises(RadladsError, match="R301"):
        TargetCache(tmp_path / "cache")
    data[-48:-12] = bytes(36)
    shard.write_bytes(data)
    module.open_shard.cache_clear()
    with pytest.raises(RadladsError, match="R301"):
        TargetCache(tmp_path / "cache").read(0, 4)
    (tmp_path / "cache" / module.HEADER).write_text("{}")
    with pytest.raises(RadladsError, match=r"R301.*no record"):
        TargetCache(tmp_path / "cache")
