"""One token of both recurrences for generation: the state is updated in place, in the slots of a batch.

Each program owns a few value rows of one head, so a state is read once and written once.
"""
import torch
from torch import Tensor

from radlads.backends.torch.kernels.lang import HAS_TRITON, OPERATOR_NAMESPACE, tl, triton


def wkv6_step(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor, state: Tensor, *, scale: float,
              slots: Tensor | None = None) -> Tensor:
    """S = S diag(exp(log_w)) + v k^T in place; returns scale * S q.

    q, log_w: (B, H, N); k, v: (B, Hkv, N) with H % Hkv == 0. state: a pool of states, contiguous float32 (S, H, N, N), rows
    are value channels. slots: int32 or int64 (B,), which of the pool's states each row has, none of them twice; -1 is a row
    that only fills the batch: it touches no state, and its output is zero. None is row i in slot i. Returns (B, H, N) in v's
    dtype. No gradients.

    Raises ValueError for what does not fit, slots beyond the pool or given twice among it. Kernels do not wait for the values
    of slots: there a row beyond the pool touches nothing and comes out as NaN, and two rows of one slot leave it in disorder.
    """
    k, v = step_repeat(k, q.shape[1]), step_repeat(v, q.shape[1])
    return wkv_step_op(q, log_w, k, v, None, None, state, slots, scale)


def wkv7_step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, *, scale: float = 1.0,
              slots: Tensor | None = None) -> Tensor:
    """S = S (diag(exp(log_w)) + a b^T) + v k^T in place; returns scale * S r. Shapes as in wkv6_step."""
    return wkv_step_op(r, log_w, k, step_repeat(v, r.shape[1]), a, b, state, slots, scale)


def step_repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::wkv_step", mutates_args={"state"})
def wkv_step_op(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, state: Tensor,
                slots: Tensor | None, scale: float) -> Tensor:
    """The step of either recurrence; a and b are None for the one without removal."""
    B, H, N = r.shape
    if state.dtype != torch.float32 or not state.is_contiguous() or state.shape[1:] != (H, N, N):
        raise ValueError(f"state must be contiguous float32 (slots, {H}, {N}, {N}), got {state.dtype} {tuple(state.shape)}")
    check_slots(slots, B, len(state))
    if not step_has_kernel(r):
        return wkv_step_plain(r, log_w, k, v, a, b, state, slots, scale)
    out = torch.empty_like(v)
    inputs = [None if x is None else x.contiguous() for x in (r, log_w, k, v, a, b)]
    # A warp a program: nothing waits for another warp, at no batch were wider programs faster.
    rows = 4
    wkv_step_kernel[(triton.cdiv(N, rows), H, B)](
        *inputs, state, slots, out, H, len(state), scale, N=N, BK=triton.next_power_of_2(N), BV=rows, REMOVE=a is not None,
        HAS_SLOTS=slots is not None, num_warps=1)
    return out


def step_has_kernel(r: Tensor) -> bool:
    return HAS_TRITON and r.is_cuda


def check_slots(slots: Tensor | None, rows: int, pool: int) -> None:
    """Refuse slots that do not fit `rows` rows and a pool of that many states; their values only where reading them is free."""
    if slots is None:
        if rows > pool:
            raise ValueError(f"{rows} rows need as many states, got {pool}")
        return
    if slots.shape != (rows,) or slots.dtype not in (torch.int32, torch.int64) or not slots.is_contiguous():
        raise ValueError(f"slots must be contiguous int32 or int64 ({rows},), got {slots.dtype} {tuple(slots.shape)}")
    if slots.device.type != "cpu":
        return
    used = [slot for slot in slots.tolist() if slot != -1]
    if len(set(used)) < len(used) or not all(0 <= slot < pool for slot in used):
        raise ValueError(f"slots must be -1 or below {pool}, none of them twice, got {slots.tolist()}")


@wkv_step_op.register_fake
def wkv_step_fake(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, state: Tensor,
                  slots: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(v)


def wkv_step_plain(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor | None, b: Tensor | None, state: Tensor,
                   slots: Tensor | None, scale: float) -> Tensor:
    out, rows, index = torch.zeros_like(v), slice(None), slice(r.shape[0])
    if slots is not None:
        rows = (slots >= 0).nonzero()[:, 0]
        index = slots[rows].long()
    r, log_w, k, value = (x[rows].float() for x in (r, log_w, k, v))
    old = state[index]
    new = old * log_w.exp()[:, :, None] + value[..., None] * k[:, :, None]
    if a is not None and b is not None:
        new += (old @ a[rows].float()[..., None]) * b[rows].float()[:, :, None]
    state[index] = new
    out[rows] = (scale * (new @ r[..., None])[..., 0]).to(v.dtype)
    return out


@triton.jit
def place_of(slots, item, pool, HAS_SLOTS: tl.constexpr):
    """Where the state of a row lies in a pool, and whether there is one: a row that fills the batch has none."""
    slot = tl.cast(item, tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots + item).to(tl.int64)
    return slot, (slot >= 0) & (slot < pool)


@triton.jit
def wkv_step_kernel(r, log_w, k, v, a, b, state, slots, out, H, pool, scale, N: tl.constexpr, BK: tl.constexpr,
                    BV: tl.constexpr, REMOVE: tl.constexpr, HAS_SLOTS: tl.constexpr):
    val = tl.program_id(0) * BV + tl.arange(0, BV)
    h = tl.program_id(1)
    item = tl.program_id(2)
    slot, known = place_of(slots, item, pool, HAS_SLOTS)
    col = tl.arange(0, BK)
    inside = (val[:, None] < N) & (col[None, :] < N) & known
    here = (item * H + h) * N
    cell = state + (slot * H + h) * N * N + val[:, None] * N + col[None, :]
    old = tl.load(cell, mask=inside, other=0.0)
    decay = tl.exp(tl.load(log_w + here + col, mask=col < N, other=0.0).to(tl.float32))
    kk = tl.load(k + here + col, mask=col < N, other=0.0).to(tl.float32)
    vv = tl.load(v + here + val, mask=val < N, other=0.0).to(tl.float32)
    new = old * decay[None, :] + vv[:, None] * kk[None, :]
    if REMOVE:
        aa = tl.load(a + here + col, mask=col < N, other=0.0).to(tl.float32)
        bb = tl.load(b + here + col, mask=col < N, other=0.0).to(tl.float32)
        new += tl.sum(old * aa[None, :], 1)[:, None] * bb[None, :]
    tl.store(cell, new, mask=inside)
    rr = tl.load(r + here + col, mask=col < N, other=0.0).to(tl.float32)
    o = tl.sum(new * rr[None, :], 1) * scale
    if HAS_SLOTS:
        o = tl.where(known, o, tl.where(slot == -1, 0.0, float("nan")))
    tl.store(out + here + val, o.to(out.dtype.element_ty), mask=val < N)
