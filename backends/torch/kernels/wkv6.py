"""The RWKV-6 recurrence (gated linear attention, vector decay): public op, custom-op registrations, kernel launches.

Kernels are in wkv6_triton, for Hopper in wkv6_fused and wkv6_hopper; the form for every other device, dtype and head size is in
wkv6_plain.
"""
from importlib import import_module

import torch
from torch import Tensor

from radlads.backends.torch.kernels.chunks import chunk_precision, chunk_tables, decay_block, decay_levels
from radlads.backends.torch.kernels.lang import HAS_GLUON, HAS_TRITON, OPERATOR_NAMESPACE, triton
from radlads.backends.torch.kernels.segments import segment_join_kernel, walk_slots, walk_span
from radlads.backends.torch.kernels.wkv6_plain import wkv6_plain
from radlads.backends.torch.kernels.wkv6_triton import (
    wkv6_grad_kernel,
    wkv6_intra_kernel,
    wkv6_reverse_kernel,
    wkv6_scan_kernel,
    wkv6_segment_kernel,
)

WKV6_HEAD_SIZES = (32, 64, 96, 128)

# (num_warps, num_stages, channels of a program) of each kernel at head sizes up to 64 and up to 128. The channels are values
# in scan and reverse, keys in grad and segment, and those taken at a time in intra.
WKV6_LAUNCH = {
    "intra": ((4, 3, 64), (4, 3, 64)),
    "scan": ((4, 2, 64), (4, 2, 64)),
    "reverse": ((4, 2, 64), (4, 2, 64)),
    "grad": ((4, 1, 64), (4, 1, 64)),
    "segment": ((4, 2, 64), (4, 2, 64)),
}


def wkv6(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor, state: Tensor | None = None, *,
         scale: float, min_log_w: float | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} diag(exp(log_w_t)) + v_t k_t^T ;  out_t = scale * S_t q_t.

    q: (B, T, H, N) float32 or bfloat16. k, v: (B, T, Hkv, N) with H % Hkv == 0; key/value head j serves query heads
    j*g ... j*g+g-1. log_w: (B, T, H, N) <= 0, float32 or bfloat16. state: float32 (B, H, N, N), rows are value channels.
    min_log_w: a bound the caller guarantees, which allows a faster path; None is exact for any decay. cu_seqlens: (n+1)
    offsets of n sequences packed along T with B == 1; the state then has n rows.
    Returns out (B, T, H, N) in v's dtype and the final state. Raises ValueError for shapes that do not fit.
    """
    wkv6_check(q, k, v, log_w, state, cu_seqlens)
    if not wkv6_has_kernel(q):
        return wkv6_plain(q, k, v, log_w, state, scale=scale, min_log_w=min_log_w, cu_seqlens=cu_seqlens)
    dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    gate = log_w if log_w.dtype == torch.bfloat16 else log_w.float()
    inputs = [x.to(dtype).contiguous() for x in (q, k, v)]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, log_w, state))
    out, final, _ = wkv6_forward_op(
        *inputs, gate.contiguous(), None if state is None else state.float().contiguous(), cu_seqlens, scale, min_log_w,
        save)
    return out.to(v.dtype), final


def wkv6_check(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    B, T, H, N = q.shape
    if log_w.shape != q.shape:
        raise ValueError(f"log_w must have q's shape {tuple(q.shape)}, got {tuple(log_w.shape)}")
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.shape[3] != N or H % k.shape[2]:
        raise ValueError(f"k and v must be (B, T, Hkv, N) with H % Hkv == 0, got {tuple(k.shape)} and {tuple(v.shape)} "
                         f"beside q {tuple(q.shape)}")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"packed sequences need a batch of 1, got {B}")
    rows = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if state is not None and state.shape != (rows, H, N, N):
        raise ValueError(f"state must be {(rows, H, N, N)}, got {tuple(state.shape)}")


def wkv6_has_kernel(q: Tensor) -> bool:
    return HAS_TRITON and q.is_cuda and q.shape[3] in WKV6_HEAD_SIZES and q.shape[1] > 0 and q.dtype != torch.float64


def wkv6_plan(q: Tensor, cu_seqlens: Tensor | None, min_log_w: float | None) -> dict[str, object]:
    """Sizes, tables and compile-time constants that all kernels of one call share."""
    B, T, _, N = q.shape
    # float32 tiles of 64 tokens do not fit in shared memory.
    C = 64 if q.dtype == torch.bfloat16 else 32
    diag, clamp = decay_block(C, min_log_w, q.dtype)
    NT = triton.cdiv(T, C)
    chunk_seq, chunk_start = chunk_tables(cu_seqlens, C, T) if cu_seqlens is not None else (None, None)
    seqs = B if cu_seqlens is None else cu_seqlens.numel() - 1
    wide = int(N > 64)
    return {
        "seqs": seqs,
        "chunks": B * NT if chunk_seq is None else chunk_seq.numel(),
        "tables": (cu_seqlens, chunk_seq, chunk_start), "T": T, "NT": NT, "C": C,
        "pairs": {"DIAG": diag, "LEVELS": decay_levels(C, diag)},
        "common": {"N": N, "C": C, "CLAMP": clamp,
                   "VARLEN": cu_seqlens is not None, **chunk_precision(q.dtype, q.device)},
        "tile": {name: choice[wide][2] for name, choice in WKV6_LAUNCH.items()},
        "launch": {
            name: {"num_warps": choice[wide][0], "num_stages": choice[wide][1]} for name, choice in WKV6_LAUNCH.items()
        },
    }


# Head sizes that the Gluon kernels serve.
WKV6_HOPPER_HEADS = (64, 96, 128)
# One program a sequence and head keeps everything on the chip but takes a chunk after the other: with fewer programs (at head
# sizes up to 64 and up to 128) the kernels that take all chunks at once are faster.
WKV6_FUSED_PROGRAMS = (84, 48)


def wkv6_has_hopper(q: Tensor, log_w: Tensor) -> bool:
    """Whether the Gluon kernel serves these inputs; the portable one serves all."""
    half = q.dtype == torch.bfloat16 and log_w.dtype == torch.bfloat16
    return (half and q.shape[-1] in WKV6_HOPPER_HEADS and HAS_GLUON and torch.version.hip is None
            and torch.cuda.get_device_capability(q.device)[0] == 9)


def wkv6_span(q: Tensor, log_w: Tensor, plan: dict[str, object]) -> int:
    """Chunks of a walk of the Gluon kernel: a sequence's, or those of its segments; 0 where the portable ones are faster."""
    H, N = q.shape[2:]
    if not wkv6_has_hopper(q, log_w):
        return 0
    span = plan["NT"]
    if plan["tables"][0] is None:
        span = walk_span(plan["seqs"] * H, span, walk_slots(q.device, N))
    return span if plan["seqs"] * triton.cdiv(plan["NT"], span) * H >= WKV6_FUSED_PROGRAMS[int(N > 64)] else 0


def wkv6_starts(k: Tensor, log_w: Tensor, v: Tensor, state: Tensor | None, scale: float, span: int, plan: dict[str, object], *,
                reverse: bool) -> Tensor:
    """The state (sequences, segments, H, N, N) float32 before each segment of `span` chunks.

    reverse: k is q, v is d(out), and the states are gradients after each segment.
    """
    H, N = log_w.shape[2:]
    walks = triton.cdiv(plan["NT"], span)
    states = log_w.new_empty((plan["seqs"], walks, H, N, N), dtype=torch.float32)
    decays = log_w.new_empty((plan["seqs"], walks, H, N), dtype=torch.float32)
    width = triton.next_power_of_2(N)
    common = {name: plan["common"][name] for name in ("N", "C", "CLAMP", "DOT", "PREC", "GATE_PREC")}
    wkv6_segment_kernel[(triton.cdiv(N, plan["tile"]["segment"]), H, plan["seqs"] * (walks - 1))](
        k, log_w, v, states, decays, plan["T"], plan["NT"], span, H, k.shape[2], v.shape[2], scale, **common,
        BK=plan["tile"]["segment"], BV=width, REVERSE=reverse, **plan["launch"]["segment"])
    rows = 16
    segment_join_kernel[(triton.cdiv(N, rows), H, plan["seqs"])](
        state, states, decays, walks, H, N=N, BN=width, ROWS=rows, MATRIX=False,
        PREC=common["GATE_PREC"], REVERSE=reverse, HAS_STATE=state is not None, num_warps=4, num_stages=1)
    return states


def wkv6_fused(q: Tensor, log_w: Tensor, k: Tensor, v: Tensor, state: Tensor | None, out: Tensor, checkpoint: Tensor,
               final: Tensor, scale: float, span: int, plan: dict[str, object], *, reverse: bool, save: bool, last: bool
               ) -> None:
    """Forward, or REVERSE, as wkv6_fused_kernel describes them, in walks of `span` chunks."""
    cu, _, chunk_start = plan["tables"]
    H, N = q.shape[2:]
    width = 128 if N > 64 else 64
    walks, ends = triton.cdiv(plan["NT"], span), final
    if walks > 1:
        # Each walk's last state may take the place of its first.
        state = ends = wkv6_starts(q if reverse else k, log_w, v, state, scale, span, plan, reverse=reverse)
    kernels = import_module("radlads.backends.torch.kernels.wkv6_fused")
    kernels.wkv6_fused_kernel[(H, plan["seqs"] * walks)](
        q, log_w, k, v, state, out, checkpoint, ends, cu, chunk_start, plan["T"], plan["NT"], span, H, k.shape[2], v.shape[2],
        scale, N=N, BN=width, CLAMP=plan["common"]["CLAMP"], **plan["pairs"], REVERSE=reverse, HAS_STATE=state is not None,
        SAVE=save, LAST=last, VARLEN=cu is not None, num_warps=width // 16)
    if walks > 1 and last:
        final.copy_(ends[:, 0 if reverse else -1])


def wkv6_pairs(q: Tensor, log_w: Tensor, k: Tensor, scale: float, plan: dict[str, object]) -> Tensor:
    """The decayed scores of every chunk, (chunks, H, C, C)."""
    H = q.shape[2]
    pairs = q.new_empty((plan["chunks"], H, plan["C"], plan["C"]))
    wkv6_intra_kernel[(H, plan["chunks"])](
        q, log_w, k, pairs, *plan["tables"], plan["T"], plan["NT"], H, k.shape[2], scale, **plan["common"],
        **plan["pairs"], BK=plan["tile"]["intra"], **plan["launch"]["intra"])
    return pairs


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::wkv6_forward", mutates_args=())
def wkv6_forward_op(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor, state: Tensor | None, cu_seqlens: Tensor | None,
                    scale: float, min_log_w: float | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, final state, state before each chunk); the last is empty unless `save`."""
    H, N = q.shape[2:]
    plan = wkv6_plan(q, cu_seqlens, min_log_w)
    cu, _, chunk_start = plan["tables"]
    out = torch.empty_like(q)
    final = q.new_empty((plan["seqs"], H, N, N), dtype=torch.float32)
    checkpoint = q.new_empty((plan["chunks"], H, N, N) if save else 0)
    span = wkv6_span(q, log_w, plan)
    if span:
        wkv6_fused(q, log_w, k, v, state, out, checkpoint, final, scale, span, plan, reverse=False, save=save, last=True)
        return out, final, checkpoint
    pairs = wkv6_pairs(q, log_w, k, scale, plan)
    sizes = (plan["T"], plan["NT"], H, k.shape[2], scale)
    wkv6_scan_kernel[(triton.cdiv(N, plan["tile"]["scan"]), H, plan["seqs"])](
        q, log_w, k, v, pairs, state, out, checkpoint, final, cu, chunk_start, *sizes, **plan["common"],
        BK=64, BV=plan["tile"]["scan"], HAS_STATE=state is not None, SAVE=save, **plan["launch"]["scan"])
    return out, final, checkpoint


@wkv6_forward_op.register_fake
def wkv6_forward_fake(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor, state: Tensor | None, cu_seqlens: Tensor | None,
                      scale: float, min_log_w: float | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, N = q.shape
    C = 64 if q.dtype == torch.bfloat16 else 32
    seqs = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = B * ((T + C - 1) // C) if cu_seqlens is None else T // C + seqs
    return (torch.empty_like(q), q.new_empty((seqs, H, N, N), dtype=torch.float32),
            q.new_empty((chunks, H, N, N) if save else 0))


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::wkv6_backward", mutates_args=())
def wkv6_backward_op(d_out: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_w: Tensor,
                     checkpoint: Tensor, cu_seqlens: Tensor | None, scale: float, min_log_w: float | None,
                     need_state: bool
                     ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_w and the initial state (empty unless needed)."""
    B, T, H, N = q.shape
    Hk = k.shape[2]
    plan = wkv6_plan(q, cu_seqlens, min_log_w)
    cu, chunk_seq, chunk_start = plan["tables"]
    d_out = d_out.contiguous()
    d_checkpoint = torch.empty_like(checkpoint)
    d_state = q.new_empty((plan["seqs"], H, N, N) if need_state else 0, dtype=torch.float32)
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    d_log_w = torch.empty_like(log_w)
    sizes = (plan["T"], plan["NT"], H, Hk, scale)
    d_final = None if d_final is None else d_final.contiguous()
    # The scores are made again rather than kept: with them the state would not fit in half a KiB a token and head.
    span = wkv6_span(q, log_w, plan)
    if span:
        wkv6_fused(q, log_w, k, d_out, d_final, dv, d_checkpoint, d_state, scale, span, plan, reverse=True, save=True,
                   last=need_state)
    else:
        wkv6_reverse_kernel[(triton.cdiv(N, plan["tile"]["reverse"]), H, plan["seqs"])](
            q, log_w, k, wkv6_pairs(q, log_w, k, scale, plan), d_out, d_final, dv, d_checkpoint, d_state, cu, chunk_start,
            *sizes, **plan["common"], BK=64, BV=plan["tile"]["reverse"], HAS_STATE=d_final is not None,
            NEED_STATE=need_state, **plan["launch"]["reverse"])
    arguments = (q, log_w, k, v, checkpoint, d_out, d_checkpoint, dq, d_log_w, dk, cu, chunk_seq, chunk_start, *sizes)
    if wkv6_has_hopper(q, log_w):
        kernels = import_module("radlads.backends.torch.kernels.wkv6_hopper")
        kernels.wkv6_hopper_grad_kernel[(triton.cdiv(N, 64), H, plan["chunks"])](
            *arguments, N=N, **plan["pairs"], CLAMP=plan["common"]["CLAMP"], VARLEN=cu_seqlens is not None, num_warps=4)
    else:
        wkv6_grad_kernel[(triton.cdiv(N, plan["tile"]["grad"]), H, plan["chunks"])](
            *arguments, **plan["common"], **plan["pairs"], BK=plan["tile"]["grad"], BV=128 if N > 64 else 64,
            **plan["launch"]["grad"])
    if Hk != H:
        dk, dv = (x.view(B, T, Hk, H // Hk, N).sum(3, dtype=torch.float32).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv, d_log_w, d_state


@wkv6_backward_op.register_fake
def wkv6_backward_fake(d_out: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_w: Tensor,
                       checkpoint: Tensor, cu_seqlens: Tensor | None, scale: float, min_log_w: float | None,
                     need_state: bool
                       ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, _, H, N = q.shape
    seqs = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_state = q.new_empty((seqs, H, N, N) if need_state else 0, dtype=torch.float32)
    return (*(torch.empty_like(x) for x in (q, k, v, log_w)), d_state)


def wkv6_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    q, k, v, log_w, state, cu_seqlens, ctx.scale, ctx.min_log_w, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.need_state = state is not None and state.requires_grad
    ctx.save_for_backward(q, k, v, log_w, output[2], cu_seqlens)


def wkv6_backward(ctx: torch.autograd.function.FunctionCtx, d_out: Tensor | None, d_final: Tensor | None, *_: None
                  ) -> tuple[Tensor | None, ...]:
    *saved, cu_seqlens = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(saved[0])
    *grads, d_state = wkv6_backward_op(d_out, d_final, *saved, cu_seqlens, ctx.scale, ctx.min_log_w, ctx.need_state)
    return *grads, d_state if ctx.need_state else None, None, None, None, None


wkv6_forward_op.register_autograd(wkv6_backward, setup_context=wkv6_setup)
