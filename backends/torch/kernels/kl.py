"""The divergence of two sets of logits, row by row, and its gradient in place of the student's logits."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from radlads.backends.torch.kernels.kl_triton import kl_grad_kernel, kl_mixture_kernel, kl_stats_kernel, scale_kernel
from radlads.backends.torch.kernels.lang import HAS_TRITON, triton

COLUMNS = 6
STUDENT_SUM, TEACHER_SUM, CROSS, PLAIN_SUM, LABEL, SLOPE = range(COLUMNS)
# Values of a row at a time, and warps of a program.
KL_LAUNCH = {"stats": (2048, 8), "mixture": (4096, 8), "grad": (4096, 8)}
# Programs that share a row of the gradient: enough for every multiprocessor until the end.
KL_SHARES = 4
# The least log-probability of a bucket of top_k, and what stands for a logit that was taken out.
LEAST_LOG, TAKEN = -80.0, -1e30


@dataclass(frozen=True)
class TopK:
    """A teacher's distribution at the temperature of the loss: its K likeliest tokens and the mass of all others.

    ids (..., K) integers, log_p (..., K) float32 log-probabilities, log_tail (...) float32 log of the rest's probability.
    """

    ids: Tensor
    log_p: Tensor
    log_tail: Tensor

    def part(self, rows: slice, device: torch.device) -> "TopK":
        """Some rows of the first dimension, on a device."""
        return TopK(*(x[rows].to(device, non_blocking=True) for x in (self.ids, self.log_p, self.log_tail)))


@dataclass(frozen=True)
class RowLoss:
    """What is measured between rows of logits.

    With p = softmax(t / tau) of the teacher, q = softmax(z / tau) of the student and w the weight of the row, a row's loss
    is w (kl_weight D + ce_weight CE), CE = -log softmax(z)[label], and D is of the kind

        kl          sum p (log p - log q)                        dD/dz = (q - p) / tau
        reverse_kl  sum q (log q - log p)                        dD/dz = q (log q - log p - D) / tau
        jsd         beta KL(p || m) + (1 - beta) KL(q || m)      dD/dz = (1 - beta) q (log q - log m - KL(q || m)) / tau
                    with m = beta p + (1 - beta) q

    or, with TopK, one of these between K + 1 masses: of the teacher's K likeliest tokens and of all others together.

    Where the vocabulary is split over the processes of `group`, each holds the columns from `first_id` on. What a row needs
    of the others is small and stands in a table (rows, 6) float32: the log-sum-exps of z / tau and t / tau, the expected
    log-ratio of the logits (or KL(p || m)), the log-sum-exp of z, the logit of the label, and the slope (or KL(q || m)).
    """

    kind: str = "kl"
    beta: float = 0.5
    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    first_id: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def logs(self) -> tuple[float, float]:
        """log beta and log(1 - beta)."""
        return (math.log(self.beta), math.log1p(-self.beta)) if self.kind == "jsd" else (0.0, 0.0)


def differentiate(z: Tensor, t: Tensor | TopK | None, labels: Tensor, weights: Tensor, table: Tensor, loss: RowLoss) -> None:
    """Fill `table` (rows, 6) and overwrite the student's logits z (rows, V) with the gradient of the summed row losses.

    t: logits (rows, V), TopK of the same rows, or None for cross-entropy alone. labels (rows,) int64, weights (rows,) float32.
    z may be a view of wider rows; with TopK and a group one spare column after the last is written to.
    """
    fast = HAS_TRITON and z.is_cuda and z.dtype != torch.float64
    stats, mixture, grad = (launch_stats, launch_mixture, launch_grad) if fast else (plain_stats, plain_mixture, plain_grad)
    if isinstance(t, TopK):
        index, found = take(z, t.ids, loss)
    logits = t if isinstance(t, Tensor) else None
    stats(z, logits, labels, table, loss)
    if loss.group is not None:
        combine(table, loss)
    if isinstance(t, TopK):
        entries = top_k(found, t, labels, table, loss)
        grad(z, None, labels, weights, table, loss)
        put(z, index, entries * weights[:, None], loss)
        return
    if loss.kind == "jsd" and logits is not None:
        mixture(z, logits, table, loss)
        if loss.group is not None:
            parts = table[:, [CROSS, SLOPE]]
            dist.all_reduce(parts, group=loss.group)
            table[:, CROSS], table[:, SLOPE] = parts.unbind(1)
    grad(z, logits, labels, weights, table, loss)


def row_losses(table: Tensor, loss: RowLoss, kind: str) -> Tensor:
    """The losses (rows,) before their weights; `kind` is none, dense or top_k by the teacher's form."""
    value = torch.zeros_like(table[:, 0])
    if kind == "top_k":
        value = table[:, CROSS]
    elif kind == "dense" and loss.kind == "jsd":
        value = loss.beta * table[:, CROSS] + (1 - loss.beta) * table[:, SLOPE]
    elif kind == "dense":
        ratio = table[:, STUDENT_SUM] - table[:, TEACHER_SUM]
        value = table[:, CROSS] + (ratio if loss.kind == "kl" else -ratio)
    value = loss.kl_weight * value
    return value + loss.ce_weight * (table[:, PLAIN_SUM] - table[:, LABEL]) if loss.ce_weight else value


def combine(table: Tensor, loss: RowLoss) -> None:
    """Sums of one shard of the vocabulary to sums of the whole."""
    sums = table[:, [STUDENT_SUM, TEACHER_SUM, PLAIN_SUM]]
    most = sums.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=loss.group)
    share = (sums - most).exp()
    cross = table[:, CROSS] * share[:, 1 if loss.kind == "kl" else 0]
    parts = torch.cat([share, cross[:, None], table[:, LABEL, None]], 1)
    dist.all_reduce(parts, group=loss.group)
    table[:, [STUDENT_SUM, TEACHER_SUM, PLAIN_SUM]] = most + parts[:, :3].log()
    table[:, CROSS] = parts[:, 3] / parts[:, 1 if loss.kind == "kl" else 0]
    table[:, LABEL] = parts[:, 4]


def take(z: Tensor, ids: Tensor, loss: RowLoss) -> tuple[Tensor, Tensor]:
    """Columns (rows, K) of z, V for one of another process, and the logits there, which leave z: the sums are of the tail."""
    V, column = z.shape[1], ids.long() - loss.first_id
    here = (column >= 0) & (column < V)
    index = torch.where(here, column, V)
    found = z.gather(1, column.clamp(0, V - 1)).to(torch.promote_types(z.dtype, torch.float32)).masked_fill_(~here, 0)
    if loss.group is not None:
        dist.all_reduce(found, group=loss.group)
    put(z, index, torch.full_like(found, TAKEN), loss)
    return index, found


def put(z: Tensor, index: Tensor, entries: Tensor, loss: RowLoss) -> None:
    """Write entries (rows, K) to columns `index` of z; those of other processes fall into the spare column."""
    wide = z if loss.group is None else z.as_strided((z.shape[0], z.shape[1] + 1), z.stride())
    wide.scatter_(1, index, entries.to(z.dtype))


def top_k(found: Tensor, t: TopK, labels: Tensor, table: Tensor, loss: RowLoss) -> Tensor:
    """Table of the divergence between K + 1 masses; the gradient (rows, K) of the logits `found` of the K tokens."""
    log_rest, log_k = table[:, STUDENT_SUM].clone(), found / loss.temperature
    table[:, STUDENT_SUM] = torch.logaddexp(log_rest, log_k.logsumexp(1))
    log_q = torch.cat([log_k, log_rest[:, None]], 1) - table[:, STUDENT_SUM, None]
    log_p = torch.cat([t.log_p, t.log_tail[:, None]], 1).to(log_q.dtype)
    log_p, log_q = log_p.clamp(min=LEAST_LOG), log_q.clamp(min=LEAST_LOG)
    p, q = log_p.exp(), log_q.exp()
    if loss.kind == "kl":
        value, slope = (p * (log_p - log_q)).sum(1), -(log_p - log_q).exp()
    elif loss.kind == "reverse_kl":
        value, slope = (q * (log_q - log_p)).sum(1), log_q - log_p
    else:
        over = over_mixture(log_p - log_q, loss)
        value = loss.beta * (p * (log_p - log_q + over)).sum(1) + (1 - loss.beta) * (q * over).sum(1)
        slope = (1 - loss.beta) * over
    slope = slope - (q * slope).sum(1, keepdim=True)
    table[:, CROSS], table[:, SLOPE] = value, slope[:, -1]
    entries = (q * slope)[:, :-1] * (loss.kl_weight / loss.temperature)
    if loss.ce_weight:
        label = t.ids == labels[:, None]
        table[:, PLAIN_SUM] = torch.logaddexp(table[:, PLAIN_SUM], found.logsumexp(1))
        table[:, LABEL] = torch.where(label.any(1), (found * label).sum(1), table[:, LABEL])
        entries += loss.ce_weight * ((found - table[:, PLAIN_SUM, None]).exp() - label.to(found.dtype))
    return entries


def over_mixture(log_ratio: Tensor, loss: RowLoss) -> Tensor:
    """log q - log m, where m = beta p + (1 - beta) q, from log p - log q."""
    return -torch.logaddexp(log_ratio + loss.logs[0], torch.full_like(log_ratio, loss.logs[1]))


def plain_stats(z: Tensor, t: Tensor | None, labels: Tensor, table: Tensor, loss: RowLoss) -> None:
    """kl_stats_kernel in array operations, in the logits' own precision."""
    raw, z = z, scaled_logits(z, loss.temperature)
    z_sum = table[:, STUDENT_SUM] = z.logsumexp(1)
    if t is not None:
        t = scaled_logits(t, loss.temperature)
        t_sum = table[:, TEACHER_SUM] = t.logsumexp(1)
        if loss.kind == "kl":
            table[:, CROSS] = torch.linalg.vecdot((t - t_sum[:, None]).exp_(), t - z)
        elif loss.kind == "reverse_kl":
            table[:, CROSS] = torch.linalg.vecdot((z - z_sum[:, None]).exp_(), z - t)
    if loss.ce_weight:
        table[:, PLAIN_SUM] = z_sum if loss.temperature == 1 else raw.logsumexp(1)
        index = labels - loss.first_id
        here = (index >= 0) & (index < z.shape[1])
        table[:, LABEL] = raw.gather(1, index.clamp(0, z.shape[1] - 1)[:, None])[:, 0] * here


def plain_mixture(z: Tensor, t: Tensor, table: Tensor, loss: RowLoss) -> None:
    """kl_mixture_kernel in array operations."""
    log_q = scaled_logits(z, loss.temperature) - table[:, STUDENT_SUM, None]
    log_p = scaled_logits(t, loss.temperature) - table[:, TEACHER_SUM, None]
    over = over_mixture(log_p - log_q, loss)
    table[:, CROSS] = (log_p.exp() * (log_p - log_q + over)).sum(1)
    table[:, SLOPE] = (log_q.exp() * over).sum(1)


def plain_grad(z: Tensor, t: Tensor | None, labels: Tensor, weights: Tensor, table: Tensor, loss: RowLoss) -> None:
    """kl_grad_kernel in array operations."""
    log_q = scaled_logits(z, loss.temperature) - table[:, STUDENT_SUM, None]
    if loss.ce_weight:
        extra = (z - table[:, PLAIN_SUM, None]).exp_()
        index = labels - loss.first_id
        here = (index >= 0) & (index < z.shape[1])
        extra.scatter_add_(1, index.clamp(0, z.shape[1] - 1)[:, None], -here[:, None].to(extra.dtype))
    if t is not None:
        log_p = scaled_logits(t, loss.temperature) - table[:, TEACHER_SUM, None]
    if t is not None and loss.kind == "kl":
        grad = log_q.exp_().sub_(log_p.exp_())
    elif t is not None and loss.kind == "reverse_kl":
        value = table[:, CROSS] - table[:, STUDENT_SUM] + table[:, TEACHER_SUM]
        grad = log_q.exp() * (log_q - log_p - value[:, None])
    elif t is not None:
        over = over_mixture(log_p - log_q, loss)
        grad = log_q.exp() * (1 - loss.beta) * (over - table[:, SLOPE, None])
    else:
        grad = log_q.exp_().mul_(table[:, SLOPE, None])
    grad.mul_((weights * (loss.kl_weight / loss.temperature))[:, None])
    if loss.ce_weight:
        grad.addcmul_(extra, (weights * loss.ce_weight)[:, None].to(extra.dtype))
    z.copy_(grad.masked_fill_((weights == 0)[:, None], 0))


def scaled_logits(x: Tensor, temperature: float) -> Tensor:
    """x / temperature in at least float32; x itself where that changes nothing."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x if temperature == 1 else x / temperature


def launch_options(z: Tensor, kernel: str) -> dict[str, int]:
    """Block, warps and table width of a launch."""
    block, warps = KL_LAUNCH[kernel]
    return {"BLOCK": min(block, triton.next_power_of_2(z.shape[1])), "num_warps": warps, "COLUMNS": COLUMNS}


def launch_stats(z: Tensor, t: Tensor | None, labels: Tensor, table: Tensor, loss: RowLoss) -> None:
    """Launch kl_stats_kernel."""
    other = z if t is None else t
    kl_stats_kernel[(len(z),)](
        z, other, labels, table, z.shape[1], z.stride(0), other.stride(0), loss.first_id, 1 / loss.temperature,
        KIND="none" if t is None else loss.kind, CE=loss.ce_weight != 0, **launch_options(z, "stats"),
    )  # fmt: skip


def launch_mixture(z: Tensor, t: Tensor, table: Tensor, loss: RowLoss) -> None:
    """Launch kl_mixture_kernel."""
    kl_mixture_kernel[(len(z),)](
        z, t, table, z.shape[1], z.stride(0), t.stride(0), 1 / loss.temperature, *loss.logs, **launch_options(z, "mixture")
    )


def launch_grad(z: Tensor, t: Tensor | None, labels: Tensor, weights: Tensor, table: Tensor, loss: RowLoss) -> None:
    """Launch kl_grad_kernel."""
    other = z if t is None else t
    kl_grad_kernel[(len(z), KL_SHARES)](
        z, other, labels, weights, table, z.shape[1], z.stride(0), other.stride(0), loss.first_id, 1 / loss.temperature,
        loss.kl_weight, loss.ce_weight, loss.beta, *loss.logs,
        KIND="top_k" if t is None else loss.kind, CE=loss.ce_weight != 0, **launch_options(z, "grad"),
    )  # fmt: skip


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor (a float32 scalar on x's device) in place; a factor of 1 moves nothing, and nobody waits for it."""
    if HAS_TRITON and x.is_cuda and x.dtype != torch.float64:
        scale_kernel[(triton.cdiv(x.numel(), 8192),)](x, factor, x.numel(), BLOCK=8192, num_warps=8)
    elif factor.is_cuda or factor != 1:
        x.mul_(factor)
