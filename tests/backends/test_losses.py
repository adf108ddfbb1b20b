"""The losses over a vocabulary against autograd in float64, and their Triton kernels under the interpreter and the compiler.

This file is also the program of the processes that need triton, or each other: `python -m tests.backends.test_losses WORD …`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch import losses
from radlads.backends.torch.kernels import kl, kl_triton
from radlads.backends.torch.losses import IGNORED, TeacherHead, TopK, distillation_loss, language_model_loss
from tests.backends.test_kernels_triton import TARGETS

ROOT = Path(__file__).resolve().parents[2]
N, V, D, K = 23, 101, 16, 7
BAR = 1e-5  # relative error of loss and gradients in float32
OPTIONS: dict[str, dict[str, float | str]] = {
    "kl": {},
    "kl-warm-ce": {"temperature": 2.0, "ce_weight": 0.3},
    "reverse": {"divergence": "reverse_kl", "temperature": 1.5},
    "reverse-ce": {"divergence": "reverse_kl", "ce_weight": 1.0},
    "jsd": {"divergence": "jsd", "beta": 0.3, "kl_weight": 2.0},
    "jsd-warm-ce": {"divergence": "jsd", "beta": 0.5, "temperature": 3.0, "ce_weight": 0.1},
    "ce": {"kl_weight": 0.0, "ce_weight": 1.0},
}


def draw(
    dtype: torch.dtype = torch.float32, device: str = "cpu", n: int = N, far: float = 1.0
) -> tuple[Tensor, Tensor, TeacherHead, Tensor]:
    """hidden, head, teacher and labels; every fifth label does not count. The last tokens' logits are `far` times as large."""
    torch.manual_seed(0)
    hidden, head, t_hidden, t_head = (torch.randn(s, dtype=dtype) * 0.7 for s in ((n, D), (V, D), (n, 12), (V, 12)))
    for x in (head, t_head):
        x[80:] *= far
    labels = torch.randint(0, V, (n,))
    labels[::5] = IGNORED
    hidden, head, t_hidden, t_head, labels = (x.to(device) for x in (hidden, head, t_hidden, t_head, labels))
    return hidden, head, TeacherHead(t_hidden, t_head), labels


def exact(
    z: Tensor, log_p: Tensor, log_q: Tensor, labels: Tensor, divergence: str = "kl", beta: float = 0.5, temperature: float = 1.0,
    kl_weight: float = 1.0, ce_weight: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss as it is written, given log-probabilities of both at the temperature."""
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    value = {
        "kl": (p * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "jsd": beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1),
    }[divergence]
    counted = labels != IGNORED
    ce = -z.log_softmax(-1).gather(-1, labels.where(counted, 0)[..., None])[..., 0]
    return ((kl_weight * value + ce_weight * ce) * counted).sum() / counted.sum()


def exact_dense(hidden: Tensor, head: Tensor, teacher: TeacherHead, labels: Tensor, **options: object) -> Tensor:
    z, t, tau = hidden @ head.T, teacher.hidden.double() @ teacher.head.double().T, options.get("temperature", 1.0)
    return exact(z, (t / tau).log_softmax(-1), (z / tau).log_softmax(-1), labels, **options)  # type: ignore[arg-type,operator]


def top_of(teacher: TeacherHead, temperature: float) -> TopK:
    log_p = (teacher.hidden.double() @ teacher.head.double().T / temperature).log_softmax(-1)
    found = log_p.topk(K)
    return TopK(found.indices, found.values, (1 - found.values.exp().sum(-1)).log())


def exact_top(hidden: Tensor, head: Tensor, top: TopK, labels: Tensor, **options: object) -> Tensor:
    z = hidden @ head.T
    q = (z / options.get("temperature", 1.0)).softmax(-1)  # type: ignore[operator]
    log_q = torch.cat([q.gather(-1, top.ids), q.scatter(-1, top.ids, 0).sum(-1, keepdim=True)], -1).log()
    return exact(z, torch.cat([top.log_p, top.log_tail[:, None]], -1), log_q, labels, **options)  # type: ignore[arg-type]


def relative(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    return [((x.detach().double() - y).norm() / y.norm()).item() for x, y in zip(found, wanted, strict=True)]


def errors(options: dict[str, float | str], top: bool, mesh: Any = None, device: str = "cpu", far: float = 1.0) -> list[float]:
    """Relative errors of loss, gradient of hidden and gradient of head; on a mesh with a part of the tokens and of the head."""
    hidden, head, teacher, labels = draw(device=device, n=N if mesh is None else N // 2 * 2, far=far)
    target = top_of(teacher, float(options.get("temperature", 1.0))) if top else teacher
    exact_inputs = [x.double().requires_grad_() for x in (hidden, head)]
    wanted = (exact_top if top else exact_dense)(*exact_inputs, target, labels, **options)
    grads = torch.autograd.grad(wanted, exact_inputs)
    if mesh is None:
        inputs = [hidden.requires_grad_(), head.clone().requires_grad_()]
        found = distillation_loss(*inputs, target, labels, **options)  # type: ignore[arg-type]
        return relative((found, *torch.autograd.grad(found, inputs)), (wanted, *grads))
    from torch.distributed.tensor import Shard, distribute_tensor

    n, size = len(labels) // mesh.size(), -(-V // mesh.size())
    mine, rows = (slice(mesh.get_rank() * many, (mesh.get_rank() + 1) * many) for many in (n, size))
    if isinstance(target, TeacherHead):
        part: TeacherHead | TopK = TeacherHead(target.hidden[mine], target.head)
    else:
        part = TopK(target.ids[mine], target.log_p[mine], target.log_tail[mine])
    inputs = [hidden[mine].clone().requires_grad_(), distribute_tensor(head, mesh, [Shard(0)]).requires_grad_()]
    found = distillation_loss(*inputs, part, labels[mine], **options)  # type: ignore[arg-type]
    of_hidden, of_head = torch.autograd.grad(found, inputs)
    taken: Any = of_head
    return relative((found, of_hidden / mesh.size(), taken.to_local()), (wanted, grads[0][mine], grads[1][rows]))


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 8 tokens in parts of 2, so that both loops run."""
    monkeypatch.setattr(losses, "tokens_at_once", lambda *_: (8, 2))


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients_are_the_float64_ones(name: str, top: bool, few_rows: None) -> None:
    found = errors(OPTIONS[name], top)
    assert max(found) < BAR, found


def test_top_k_of_everything_is_the_whole_divergence() -> None:
    hidden, head, teacher, labels = draw()
    log_p = (teacher.hidden @ teacher.head.T).log_softmax(-1)
    everything = TopK(torch.arange(V).expand(N, V), log_p, torch.full((N,), -torch.inf))
    whole, found = (distillation_loss(hidden, head, t, labels) for t in (teacher, everything))
    assert found.item() == pytest.approx(whole.item(), rel=1e-5)


def test_parts_of_a_batch_add_up_to_its_mean(few_rows: None) -> None:
    hidden, head, teacher, labels = draw()
    hidden.requires_grad_()
    whole = distillation_loss(hidden, head, teacher, labels)
    (wanted,) = torch.autograd.grad(whole, hidden)
    count, total = (labels != IGNORED).sum(), 0.0
    for part in (slice(0, 4), slice(4, N)):
        some = TeacherHead(teacher.hidden[part], teacher.head)
        loss = distillation_loss(hidden[part], head, some, labels[part], divisor=count)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-6) and hidden.grad is not None
    torch.testing.assert_close(hidden.grad, wanted)


def test_what_does_not_count_changes_nothing() -> None:
    hidden, head, teacher, labels = draw()
    wanted = distillation_loss(hidden, head, teacher, labels)
    broken = hidden.masked_fill((labels == IGNORED)[:, None], torch.inf).requires_grad_()
    found = distillation_loss(broken, head.requires_grad_(), teacher, labels)
    assert found.item() == wanted.item()
    (grad,) = torch.autograd.grad(found, broken)
    assert torch.isfinite(grad).all() and not grad[labels == IGNORED].any()
    nothing = distillation_loss(hidden, head, teacher, torch.full_like(labels, IGNORED))
    assert nothing.item() == 0


def test_frozen_head_has_no_gradient_and_float32_ones_are_more_exact() -> None:
    hidden, head, teacher, labels = draw(torch.bfloat16)
    exact_head = head.double().requires_grad_()
    wanted = torch.autograd.grad(exact_dense(hidden.double(), exact_head, teacher, labels), exact_head)[0]
    hidden.requires_grad_()
    distillation_loss(hidden, head, teacher, labels).backward()
    assert hidden.grad is not None and head.grad is None and not hidden.grad.requires_grad
    outs = torch.ops.radlads.linear_divergence
    rest = (None, None, None, labels.clamp(min=0), (labels != IGNORED).float() / (labels != IGNORED).sum())
    arguments = (hidden.detach(), head, teacher.hidden, teacher.head, *rest, "kl", 0.5, 1.0, 1.0, 0.0, "", False, True)
    rough, fine = (outs(*arguments, wide)[2] for wide in (False, True))
    assert rough.dtype == torch.bfloat16 and fine.dtype == torch.float32
    assert relative((fine,), (wanted,)) < relative((rough,), (wanted,))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rounding_is_no_worse_than_with_all_logits_at_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, six groups: a float32 teacher makes up for the head's gradient, which is rounded once a group.

    Drawn as in bench/kl.py; where logits are smaller, their rounding is less and the head's counts for more.
    """
    torch.manual_seed(0)
    drawn = (torch.randn(*size) for size in ((768, 128), (3000, 128), (768, 128), (3000, 128)))
    hidden, head, t_hidden, t_head = (x.to(device, torch.bfloat16) for x in drawn)
    head, t_head = (x * 1.2 * 128**-0.5 for x in (head, t_head))
    labels, teacher = torch.zeros(768, dtype=torch.long, device=device), TeacherHead(t_hidden, t_head)
    inputs, exact_inputs = [hidden.requires_grad_(), head.requires_grad_()], [x.double() for x in (hidden, head)]
    wanted = torch.autograd.grad(exact_dense(*exact_inputs, teacher, labels), exact_inputs)
    target = (t_hidden @ t_head.T).float().log_softmax(-1)
    all_at_once = F.kl_div((hidden @ head.T).float().log_softmax(-1), target, log_target=True, reduction="batchmean")
    plain = relative(torch.autograd.grad(all_at_once, inputs), wanted)
    found = {}
    monkeypatch.setattr(losses, "tokens_at_once", lambda *_: (128, 64))
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(losses, "teacher_dtype", lambda _, dtype=dtype: dtype)
        ours = distillation_loss(*inputs, teacher, labels)  # type: ignore[arg-type]
        found[dtype] = relative(torch.autograd.grad(ours, inputs), wanted)
    assert all(ours < theirs for ours, theirs in zip(found[torch.float32], plain, strict=True)), (found, plain)
    assert found[torch.bfloat16][1] > plain[1], (found, plain)


@pytest.mark.parametrize("vocab", [49152, 128256, 151936, 152064, 262144])
def test_logits_stay_within_their_memory(vocab: int) -> None:
    """Three quarters of a GiB on a GPU, whatever the vocabulary, the dtype and the teacher are, and no less than they need."""
    assert losses.WIDE_TEACHER and losses.tokens_at_once(152064, 2, 4, "cuda") == (1536, 512)
    for itemsize, of_teacher in ((2, 4), (2, 0), (4, 4), (4, 0)):
        many, few = losses.tokens_at_once(vocab, itemsize, of_teacher, "cuda")
        held = (vocab // 64 + 1) * 64 * (many * itemsize + few * of_teacher) / 2**30
        assert many % few == 0 and few % 128 == 0 and 0.35 < held < 0.75, (many, few, held)


def test_gradients_are_scaled_once() -> None:
    hidden, head, teacher, labels = draw()
    hidden.requires_grad_()
    loss = distillation_loss(hidden, head, teacher, labels)
    (loss * -3).backward(retain_graph=True)
    (wanted,) = torch.autograd.grad(distillation_loss(hidden, head, teacher, labels), hidden)
    torch.testing.assert_close(hidden.grad, wanted * -3)
    with pytest.raises(RuntimeError, match="inplace"):  # the gradients were scaled in their own memory
        loss.backward()


def test_compiles_without_graph_breaks() -> None:
    hidden, head, teacher, labels = draw()
    inputs = [hidden.requires_grad_(), head.requires_grad_()]

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return distillation_loss(hidden * 2, head, teacher, labels, ce_weight=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_options_and_shapes_that_do_not_fit_are_refused() -> None:
    hidden, head, teacher, labels = draw()
    for options in ({"divergence": "tv"}, {"divergence": "jsd", "beta": 1.0}):
        with pytest.raises(ValueError, match="divergence must be"):
            distillation_loss(hidden, head, teacher, labels, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit"):
        distillation_loss(hidden, head, teacher, labels[:3])
    with pytest.raises(ValueError, match="does not fit"):
        distillation_loss(hidden, head, TeacherHead(teacher.hidden, teacher.head[:5]), labels)


def test_language_model_loss_is_mean_cross_entropy(few_rows: None) -> None:
    hidden, head, _, labels = draw()
    wanted = torch.nn.functional.cross_entropy((hidden @ head.T).double(), labels)
    assert language_model_loss(hidden, head, labels).item() == pytest.approx(wanted.item(), rel=1e-5)


def child(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([sys.executable, "-m", "tests.backends.test_losses", *words], cwd=ROOT, text=True,
                         capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, timeout=600)  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run


def test_vocabulary_split_over_processes(tmp_path: Path) -> None:
    """Two processes with half of the tokens each, and 51 and 50 rows of the head: loss and gradients of the whole."""
    found = json.loads(child("shards", str(tmp_path)).stdout.splitlines()[-1])
    assert len(found) == 2 * len(OPTIONS) and max(max(e) for e in found.values()) < BAR, found


def test_interpreter_matches_float64() -> None:
    pytest.importorskip("triton")
    found = json.loads(child("interpret", TRITON_INTERPRET="1").stdout.splitlines()[-1])
    assert set(found) == {*OPTIONS, "kl-far", "reverse-ce-far"} and max(max(e) for e in found.values()) < BAR, found


def test_kernels_compile_for_every_target() -> None:
    pytest.importorskip("triton")
    found = json.loads(child("compile", TRITON_INTERPRET="0").stdout.splitlines()[-1])
    assert len(found) == 9 and not any(found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_gpu_matches_float64(name: str, top: bool, few_rows: None) -> None:
    found = errors(OPTIONS[name], top, device="cuda")
    assert max(found) < BAR, found


def interpret() -> None:
    """Every option, on CPU tensors by the kernels, with rows of several blocks, some with far larger logits at their end."""
    kl.HAS_TRITON, losses.tokens_at_once = True, lambda *_: (16, 16)  # type: ignore[assignment]
    kl.KL_LAUNCH = dict.fromkeys(kl.KL_LAUNCH, (32, 4))
    for name in ("launch_stats", "launch_mixture", "launch_grad"):
        setattr(kl, name.replace("launch", "plain"), getattr(kl, name))
    found = {name: errors(options, name == "kl-warm-ce") for name, options in OPTIONS.items()}
    print(json.dumps(found | {f"{name}-far": errors(OPTIONS[name], False, far=60) for name in ("kl", "reverse-ce")}))


def shards(rank: int, folder: str) -> None:
    """One of two processes; rank 0 prints the errors of both."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    losses.tokens_at_once = lambda *_: (8, 2)  # type: ignore[assignment]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    found = {f"{name} {top}": errors(o, top, mesh) for name, o in OPTIONS.items() for top in (False, True)}
    everyone: list[object] = [None, None]
    dist.all_gather_object(everyone, found)
    if rank == 0:
        first, second = everyone
        print(json.dumps({name: first[name] + second[name] for name in found}), flush=True)  # type: ignore[index]
    dist.destroy_process_group()


def compile_kernels() -> None:
    """Bytes spilled per thread of each kernel on each NVIDIA target; other targets only have to compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.backends.test_kernels_triton import stack_bytes

    report = {}
    for name in ("stats", "mixture", "grad"):
        kernel = getattr(kl_triton, f"kl_{name}_kernel")
        block, warps = kl.KL_LAUNCH[name]
        constants = {"KIND": "jsd" if name == "mixture" else "kl", "CE": True, "COLUMNS": kl.COLUMNS, "BLOCK": block}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        kinds = {"student": "*bf16", "teacher": "*bf16", "labels": "*i64", "weights": "*fp32", "table": "*fp32"}
        kinds |= {key: "i32" for key in ("V", "student_stride", "teacher_stride", "first_id")}
        signature = {arg: "constexpr" if arg in constants else kinds.get(arg, "fp32") for arg in kernel.arg_names}
        for target, (where, _) in TARGETS.items():
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            built = triton.compile(source, target=GPUTarget(*where), options={"num_warps": warps})
            report[f"{target} {name}"] = stack_bytes(built.asm.get("cubin"))
    print(json.dumps(report))


if __name__ == "__main__":
    word, *rest = sys.argv[1:]
    if word == "shards":
        torch.multiprocessing.spawn(shards, (rest[0],), nprocs=2)
    else:
        {"interpret": interpret, "compile": compile_kernels}[word]()
