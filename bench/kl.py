"""Times the distillation loss from hidden states on one GPU against its floor of four matrix products, and against peers.

Run: python bench/kl.py [--tokens 8192] [--width 3584] [--vocab 152064] [--forms ours,plain,...] [--launches] [--close]
Prints one row per form, last: milliseconds of forward and backward, over the floor, GiB beyond the inputs and the gradients
that are returned, and relative RMS errors against float64 (of the first 512 tokens, or, for the head's gradient, of 256 rows).
The floor is four products of these sizes at the rate of 8192 x 8192 x 8192, which is measured anew before each form: a card
that has worked for a while is slower. "x four" is over the four products themselves. Liger's loss is timed where liger_kernel
is importable.
"""
import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from radlads.backends.torch import losses
from radlads.backends.torch.kernels import kl
from radlads.backends.torch.losses import TeacherHead, TopK, distillation_loss

DEVICE = "cuda"
# Tokens of a group, tokens of a teacher's part, and whether the teacher's logits are float32.
GROUPS = ((2048, 512, False), (1536, 512, True), (1664, 448, True))
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(tokens: int, width: int, vocab: int, close: bool, device: str) -> Inputs:
    """hidden, head, teacher's hidden, teacher's head, labels; `close`: a student near its teacher, with logits up to 20."""
    torch.manual_seed(0)
    spread = (4 if close else 1.2) * width**-0.5
    hidden, head = torch.randn(tokens, width, device=device), torch.randn(vocab, width, device=device) * spread
    if close:
        t_hidden, t_head = hidden + 0.02 * torch.randn_like(hidden), head.clone()
    else:
        t_hidden, t_head = torch.randn_like(hidden), torch.randn_like(head) * spread
    inputs = [x.to(torch.bfloat16) for x in (hidden, head, t_hidden, t_head)]
    return inputs[0].requires_grad_(), inputs[1].requires_grad_(), *inputs[2:], torch.randint(0, vocab, (tokens,), device=device)


def ours(inputs: Inputs, **options: object) -> Tensor:
    hidden, head, t_hidden, t_head, labels = inputs
    return distillation_loss(hidden, head, TeacherHead(t_hidden, t_head), labels, **options)


def plain(inputs: Inputs) -> Tensor:
    """All logits at once."""
    hidden, head, t_hidden, t_head, _ = inputs
    with torch.no_grad():
        target = F.linear(t_hidden, t_head).float().log_softmax(-1)
    return F.kl_div(F.linear(hidden, head).float().log_softmax(-1), target, log_target=True, reduction="sum") / len(hidden)


def published(inputs: Inputs) -> Tensor:
    """512 tokens at a time, made again in the backward pass."""
    hidden, head, t_hidden, t_head, labels = inputs

    def part(hidden: Tensor, t_hidden: Tensor) -> Tensor:
        return plain((hidden, head, t_hidden, t_head, labels)) * len(hidden)

    parts = zip(hidden.split(512), t_hidden.split(512), strict=True)
    return sum(torch.utils.checkpoint.checkpoint(part, *x, use_reentrant=False) for x in parts) / len(hidden)


def grouped(many: int, few: int, wide: bool, inputs: Inputs) -> Tensor:
    """Ours with other numbers of tokens whose student's and teacher's logits exist at once."""
    before = losses.tokens_at_once, losses.WIDE_TEACHER
    losses.tokens_at_once, losses.WIDE_TEACHER = lambda *_: (many, few), wide
    try:
        return ours(inputs)
    finally:
        losses.tokens_at_once, losses.WIDE_TEACHER = before


def liger() -> Callable[[Inputs], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(beta=0.0, weight_hard_loss=0.0, weight_soft_loss=1.0, chunk_size=1024)
    return lambda x: loss(x[0], x[1], x[2], x[3], x[4])


def forms(wanted: str, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    frozen = (inputs[0], inputs[1].detach(), *inputs[2:])
    found: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ours(inputs),
        "ours again": lambda: ours(inputs),
        "ours, float32 head gradient": lambda: ours(inputs, float32_head_grad=True),
        "ours, frozen head": lambda: ours(frozen),
        "ours, reverse KL": lambda: ours(inputs, divergence="reverse_kl"),
        "ours, JSD": lambda: ours(inputs, divergence="jsd"),
        "ours, KL + CE": lambda: ours(inputs, ce_weight=0.1),
        "ours, top 64": lambda: distillation_loss(inputs[0], inputs[1], top, inputs[4]),
        "512 tokens, checkpointed": lambda: published(inputs),
        "plain, all logits": lambda: plain(inputs),
    }
    for many, few, wide in GROUPS:
        name = f"groups {many}, {few} {'float32' if wide else 'bf16'}"
        found[name] = lambda many=many, few=few, wide=wide: grouped(many, few, wide, inputs)
    ids = torch.randint(0, inputs[1].shape[0], (len(inputs[0]), 64), device=inputs[0].device)
    top = TopK(ids, torch.full(ids.shape, -5.0, device=ids.device), torch.full(ids.shape[:1], -0.57, device=ids.device))
    try:
        peer = liger()
        found["liger 0.8.5 chunked"] = lambda: peer(inputs)
    except ImportError:
        pass
    return {name: form for name, form in found.items() if wanted == "all" or any(name.startswith(w) for w in wanted.split(","))}


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Gradients in float64: of the first 512 tokens' hidden states, and of the head's first 256 rows."""
    hidden, head, t_hidden, t_head, _ = (x.detach() for x in inputs)
    rows = min(256, len(head))
    by_hidden, by_head = [], torch.zeros(rows, head.shape[1], dtype=torch.float64, device=head.device)
    for start in range(0, len(hidden), 256):
        part = slice(start, start + 256)
        z, t = (chunked_logits(x[part], w) for x, w in ((hidden, head), (t_hidden, t_head)))
        grad = (z.softmax(-1) - t.softmax(-1)) / len(hidden)
        by_head += grad[:, :rows].T @ hidden[part].double()
        if start < 512:
            by_hidden.append(sum(g @ w.double() for g, w in zip(grad.split(8192, 1), head.split(8192), strict=True)))
    return torch.cat(by_hidden), by_head


def chunked_logits(hidden: Tensor, head: Tensor) -> Tensor:
    return torch.cat([hidden.double() @ part.double().T for part in head.split(8192)], 1)


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found[: len(wanted)].double() - wanted).norm() / wanted.norm()).item()


def milliseconds(fn: Callable[[], object], repeats: int) -> float:
    fn()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def matmul_rate(repeats: int) -> float:
    """TFLOP/s of a large product."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b, repeats) / 1e9


def four_products(inputs: Inputs, repeats: int) -> float:
    """Milliseconds of both logits, d hidden and d head as they are, 2,048 tokens at a time, with nothing between."""
    hidden, head, t_hidden, t_head, _ = (x.detach() for x in inputs)
    logits = torch.empty(2048, len(head), dtype=head.dtype, device=head.device)
    grad, total = torch.empty_like(hidden), head.clone()

    def all_four() -> None:
        for x, y, out in zip(hidden.split(2048), t_hidden.split(2048), grad.split(2048), strict=True):
            part = logits[: len(x)]
            torch.mm(y, t_head.T, out=part)
            torch.mm(x, head.T, out=part)
            torch.mm(part, head, out=out)
            torch.mm(part.T, x, out=total)

    return milliseconds(all_four, repeats)


def measure(name: str, form: Callable[[], Tensor], inputs: Inputs, repeats: int, wanted: tuple[Tensor, Tensor]) -> str:
    hidden, head = inputs[:2]

    def both() -> None:
        hidden.grad = head.grad = None
        form().backward()

    try:
        torch.cuda.empty_cache()
        hidden.grad = head.grad = None
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        both()
        peak = torch.cuda.max_memory_allocated() - held
        returned = sum(x.grad.nbytes for x in (hidden, head) if x.grad is not None)
        same = not any(word in name for word in ("reverse", "JSD", "CE", "top"))  # the others have gradients of their own
        pairs = zip((hidden, head), wanted, strict=True)
        found = [relative(x.grad, y) if x.grad is not None and same else float("nan") for x, y in pairs]
        floor = 4 * 2 * len(hidden) * head.numel() / matmul_rate(60) / 1e9
        took = milliseconds(both, repeats)
        four = four_products(inputs, repeats)
    except torch.OutOfMemoryError:
        return f"{name:30s} out of memory"
    return (f"{name:30s} {took:8.1f} {floor:8.1f} {took / floor:7.2f} {took / four:7.2f} {(peak - returned) / 2**30:7.2f} "
            f"{found[0]:10.2e} {found[1]:10.2e}")


def launches(inputs: Inputs) -> None:
    """The two passes over the logits by block and warps, and the products by the number of tokens."""
    hidden, head, t_hidden, _, labels = (x.detach() for x in inputs)
    rows = min(512, len(hidden))
    z, t = F.linear(hidden[:rows], head), F.linear(t_hidden[:rows], head)
    table = torch.zeros(rows, kl.COLUMNS, device=z.device)
    weights = torch.ones(rows, device=z.device)
    chosen = kl.KL_LAUNCH
    shares = kl.KL_SHARES
    for launch in ((2048, 4), (2048, 8), (4096, 8), (4096, 16)):
        kl.KL_LAUNCH = dict.fromkeys(chosen, launch)
        for other in (t, t.float()):
            stats = partial(kl.launch_stats, z, other, labels[:rows], table, kl.RowLoss())
            grad = partial(kl.launch_grad, z, other, labels[:rows], weights, table, kl.RowLoss())
            took = []
            for kl.KL_SHARES, kernel in ((1, stats), (1, grad), (4, grad)):
                took.append(milliseconds(lambda: [kernel() for _ in range(8)], 5) / 8)  # noqa: B023
            moved = [z.nbytes + other.nbytes, *[2 * z.nbytes + other.nbytes] * 2]
            rates = ", ".join(f"{name} {ms:.3f} ms ({size / ms / 1e9:.2f} TB/s)"
                              for name, ms, size in zip(("stats", "grad", "grad in 4 shares"), took, moved, strict=True))
            print(f"block, warps {launch}, teacher {str(other.dtype)[6:]}, {rows} tokens: {rates}", flush=True)
    kl.KL_LAUNCH, kl.KL_SHARES = chosen, shares
    for rows in (512, 1024, 2048, 4096):
        if rows <= len(hidden):
            products(hidden[:rows], head)


def products(hidden: Tensor, head: Tensor) -> None:
    """Rates of the three products of one group of tokens."""
    rows = len(hidden)
    logits = torch.empty(rows, (len(head) // 64 + 1) * 64, dtype=head.dtype, device=head.device)[:, : len(head)]
    total, fine = torch.zeros_like(head), torch.zeros_like(head, dtype=torch.float32)
    took = {
        "logits": milliseconds(lambda: torch.mm(hidden, head.T, out=logits), 5),
        "d hidden": milliseconds(lambda: torch.mm(logits, head), 5),
        "d head": milliseconds(lambda: losses.add_product(total, logits.T, hidden, first=False), 5),
        "d head in float32": milliseconds(lambda: losses.add_product(fine, logits.T, hidden, first=False), 5),
    }
    rates = ", ".join(f"{name} {2 * rows * head.numel() / ms / 1e9:.0f}" for name, ms in took.items())
    print(f"{rows} tokens, TFLOP/s: {rates}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--vocab", type=int, default=152064)
    parser.add_argument("--forms", default="all", help="names, or how they begin, comma-separated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--launches", action="store_true", help="also time the kernels by launch and the products by size")
    parser.add_argument("--close", action="store_true", help="a student near its teacher, with larger logits")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/kl.py needs a GPU")
    inputs = draw(options.tokens, options.width, options.vocab, options.close, DEVICE)
    cold, warm = matmul_rate(15), matmul_rate(300)
    floors = [4 * 2 * options.tokens * options.width * options.vocab / rate / 1e9 for rate in (cold, warm)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, matmul {cold:.0f} TFLOP/s cold, {warm:.0f} warm, floor "
          f"{floors[0]:.1f} and {floors[1]:.1f} ms at {options.tokens} x {options.width} x {options.vocab}", flush=True)
    if options.launches:
        launches(inputs)
    chosen = forms(options.forms, inputs)
    if not chosen:
        return
    wanted = exact(inputs)
    torch.cuda.empty_cache()
    rows = []
    for name, form in chosen.items():
        rows.append(measure(name, form, inputs, options.repeats, wanted))
        print(rows[-1], flush=True)
    columns = ("ms", "floor ms", "x floor", "x four", "GiB", "d hidden", "d head")
    widths = (8, 8, 7, 7, 7, 10, 10)
    heading = f"{'form':30s}" + "".join(f" {name:>{width}s}" for name, width in zip(columns, widths, strict=True))
    print("\n" + heading, *rows, sep="\n")


if __name__ == "__main__":
    main()
