"""The RWKV-7 recurrence (generalised delta rule): public op, custom-op registrations and kernel launches.

Kernels are in wkv7_triton and wkv7_centred, for Hopper in wkv7_fused and wkv7_hopper; the form for every other device, dtype
and head size is in wkv7_plain.
"""
from importlib import import_module

import torch
from torch import Tensor

from radlads.backends.torch.kernels.chunks import chunk_precision, chunk_tables, decay_block, decay_levels
from radlads.backends.torch.kernels.lang import HAS_GLUON, HAS_TRITON, OPERATOR_NAMESPACE, triton
from radlads.backends.torch.kernels.segments import segment_join_kernel, walk_slots, walk_span
from radlads.backends.torch.kernels.wkv7_centred import (
    wkv7_centred_grad_kernel,
    wkv7_centred_solve_kernel,
)
from radlads.backends.torch.kernels.wkv7_plain import wkv7_plain
from radlads.backends.torch.kernels.wkv7_triton import (
    wkv7_grad_kernel,
    wkv7_reverse_kernel,
    wkv7_scan_kernel,
    wkv7_solve_kernel,
)

WKV7_HEAD_SIZES = (32, 64, 96, 128)

# (num_warps, num_stages, channels at a time) of each kernel at head sizes up to 64 and up to 128; the channels are those of
# the values in scan and reverse, of the keys in solve and grad.
WKV7_LAUNCH = {
    "solve": ((4, 2, 64), (4, 2, 64)),
    "scan": ((4, 2, 64), (4, 2, 64)),
    "reverse": ((4, 2, 64), (4, 2, 64)),
    "grad": ((4, 1, 64), (4, 1, 64)),
    "centred_solve": ((4, 1, 64), (4, 1, 64)),
    "centred_grad": ((4, 1, 64), (4, 1, 64)),
}


def wkv7(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None, *,
         scale: float = 1.0, min_log_w: float | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} (diag(exp(log_w_t)) + a_t b_t^T) + v_t k_t^T ;  out_t = scale * S_t r_t.

    r, k, a, b: (B, T, H, N) float32 or bfloat16. log_w: (B, T, H, N) <= 0, float32 or bfloat16. v: (B, T, Hv, N) with
    H % Hv == 0; value head j serves heads j*g ... j*g+g-1. state: float32 (B, H, N, N), rows are value channels.
    cu_seqlens: (n+1) offsets of n sequences packed along T with B == 1; the state then has n rows. min_log_w: a bound the
    caller guarantees, which allows a faster path; None is exact for any decay.
    Returns out (B, T, H, N) in v's dtype and the final state. Raises ValueError for shapes that do not fit.
    """
    wkv7_check(r, log_w, k, v, a, b, state, cu_seqlens)
    if not wkv7_has_kernel(r):
        return wkv7_plain(r, log_w, k, v, a, b, state, scale=scale, min_log_w=min_log_w, cu_seqlens=cu_seqlens)
    dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    gate = log_w if log_w.dtype == torch.bfloat16 else log_w.float()
    inputs = [x.to(dtype).contiguous() for x in (r, k, v, a, b)]
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (r, log_w, k, v, a, b, state))
    out, final, *_ = wkv7_forward_op(
        inputs[0], gate.contiguous(), *inputs[1:], None if state is None else state.float().contiguous(),
        cu_seqlens, scale, min_log_w, save)
    return out.to(v.dtype), final


def wkv7_check(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
               cu_seqlens: Tensor | None) -> None:
    B, T, H, N = r.shape
    if any(x.shape != r.shape for x in (log_w, k, a, b)):
        raise ValueError(f"r, log_w, k, a and b must have one shape, got r {tuple(r.shape)} and "
                         f"{[tuple(x.shape) for x in (log_w, k, a, b)]}")
    if v.shape[:2] != (B, T) or v.shape[3] != N or H % v.shape[2]:
        raise ValueError(f"v must be (B, T, Hv, N) with H % Hv == 0, got {tuple(v.shape)} beside r {tuple(r.shape)}")
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"packed sequences need a batch of 1, got {B}")
    rows = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if state is not None and state.shape != (rows, H, N, N):
        raise ValueError(f"state must be {(rows, H, N, N)}, got {tuple(state.shape)}")


def wkv7_has_kernel(r: Tensor) -> bool:
    return HAS_TRITON and r.is_cuda and r.shape[3] in WKV7_HEAD_SIZES and r.shape[1] > 0 and r.dtype != torch.float64


def wkv7_has_hopper(r: Tensor, log_w: Tensor) -> bool:
    """Whether the Gluon kernels serve these inputs; the portable ones serve all."""
    return (r.dtype == torch.bfloat16 and log_w.dtype == torch.bfloat16 and HAS_GLUON and torch.version.hip is None
            and torch.cuda.get_device_capability(r.device)[0] == 9)


# One program a sequence and head keeps everything on the chip but takes a chunk after the other: with fewer programs (at head
# sizes up to 64 and up to 128) the kernels that take all chunks at once are faster.
WKV7_FUSED_PROGRAMS = (84, 48)


# What the first walk over a segment costs, in chunks of the second.
WKV7_LOCAL_COST = 0.8


def wkv7_span(r: Tensor, log_w: Tensor, plan: dict[str, object]) -> int:
    """Chunks of a walk of the Gluon kernels: a sequence's, or those of its segments; 0 where the others are faster."""
    H, N = r.shape[2:]
    if not (plan["centred"] and N >= 64 and wkv7_has_hopper(r, log_w)):
        return 0
    span = plan["NT"]
    if plan["tables"][0] is None:
        span = walk_span(plan["seqs"] * H, span, walk_slots(r.device, N), WKV7_LOCAL_COST)
    return span if plan["seqs"] * triton.cdiv(plan["NT"], span) * H >= WKV7_FUSED_PROGRAMS[int(N > 64)] else 0


def wkv7_join(state: Tensor | None, states: Tensor, passes: Tensor, *, reverse: bool) -> None:
    """In place: from what each segment adds (at the next one's place) and its matrix to the state each one begins with."""
    seqs, walks, H, N = states.shape[:4]
    rows = 16
    segment_join_kernel[(triton.cdiv(N, rows), H, seqs)](
        state, states, passes, walks, H, N=N, BN=triton.next_power_of_2(N), ROWS=rows, MATRIX=True,
        PREC=chunk_precision(states.dtype, states.device)["GATE_PREC"], REVERSE=reverse, HAS_STATE=state is not None,
        num_warps=8, num_stages=1)


def wkv7_starts(log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, span: int,
                plan: dict[str, object]) -> tuple[Tensor, Tensor]:
    """The state (sequences, segments, H, N, N) float32 before each segment of `span` chunks, and each one's matrix."""
    H, N = log_w.shape[2:]
    walks = triton.cdiv(plan["NT"], span)
    states, passes = (log_w.new_empty((plan["seqs"], walks, H, N, N), dtype=torch.float32) for _ in range(2))
    kernels = import_module("radlads.backends.torch.kernels.wkv7_segment")
    kernels.wkv7_segment_kernel[(H, plan["seqs"] * walks)](
        log_w, k, v, a, b, states, passes, plan["T"], plan["NT"], span, H, v.shape[2], N=N, BN=plan["width"],
        CLAMP=plan["gates"]["CLAMP"], num_warps=plan["width"] // 16)
    wkv7_join(state, states, passes, reverse=False)
    return states, passes


def wkv7_plan(v: Tensor, heads: int, cu_seqlens: Tensor | None, min_log_w: float | None) -> dict[str, object]:
    """Sizes, tables and compile-time constants that all four kernels of one call share."""
    B, T, _, N = v.shape
    precision = chunk_precision(v.dtype, v.device)
    # float32 tiles of 64 tokens do not fit in shared memory.
    C = 64 if v.dtype == torch.bfloat16 else 32
    diag, clamp = decay_block(C, min_log_w, v.dtype)
    NT = triton.cdiv(T, C)
    chunk_seq, chunk_start = chunk_tables(cu_seqlens, C, T) if cu_seqlens is not None else (None, None)
    wide = int(N > 64)
    return {
        "seqs": B if cu_seqlens is None else cu_seqlens.numel() - 1,
        "chunks": B * NT if chunk_seq is None else chunk_seq.numel(),
        "store": torch.bfloat16 if precision["PREC"] == "tf32" else torch.float32,
        "tables": (cu_seqlens, chunk_seq, chunk_start), "T": T, "NT": NT, "C": C, "centred": diag == C,
        "pairs": {"DIAG": diag, "LEVELS": decay_levels(C, diag)},
        "width": 128 if N > 64 else 64,
        "common": {"N": N, "C": C, "VARLEN": cu_seqlens is not None, "DOT": precision["DOT"], "PREC": precision["PREC"]},
        "gates": {"CLAMP": clamp, "GATE_PREC": precision["GATE_PREC"]},
        "tile": {name: choice[wide][2] for name, choice in WKV7_LAUNCH.items()},
        "launch": {
            name: {"num_warps": choice[wide][0], "num_stages": choice[wide][1]} for name, choice in WKV7_LAUNCH.items()
        },
    }


def wkv7_solve(r: Tensor, log_w: Tensor, k: Tensor, a: Tensor, b: Tensor, scale: float, plan: dict[str, object],
               kept: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
    """Each chunk's factors, as wkv7_solve_kernel names them: solve, a_rb (both kept by a bounded forward), then the scan's."""
    H, N = r.shape[2:]
    chunks, C = plan["chunks"], plan["C"]
    solve, a_rb = kept or [r.new_empty((chunks, H, C, C), dtype=plan["store"]) for _ in range(2)]
    pairs = [r.new_empty((chunks, H, C, C), dtype=plan["store"]) for _ in range(2)]
    sides = [r.new_empty((chunks, H, C, N), dtype=plan["store"]) for _ in range(4)]
    whole = r.new_empty((chunks, H, N), dtype=torch.float32)
    arguments = (r, log_w, k, a, b, solve, a_rb, *pairs, *sides, whole, *plan["tables"], plan["T"], plan["NT"], H, scale)
    levels = C.bit_length() - 1
    if plan["centred"]:
        wkv7_centred_solve_kernel[(H, chunks)](
            *arguments, **plan["common"], CLAMP=plan["gates"]["CLAMP"], KNOWN=kept is not None,
            BK=plan["tile"]["centred_solve"], SOLVE_LEVELS=levels, **plan["launch"]["centred_solve"])
    else:
        wkv7_solve_kernel[(H, chunks)](
            *arguments, **plan["common"], **plan["gates"], **plan["pairs"], BK=plan["tile"]["solve"],
            SOLVE_LEVELS=levels, **plan["launch"]["solve"])
    return solve, a_rb, *pairs, *sides, whole


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::wkv7_forward", mutates_args=())
def wkv7_forward_op(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
                    cu_seqlens: Tensor | None, scale: float, min_log_w: float | None, save: bool
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, final state, u, state of each chunk, solution matrices, A_rb, segments' matrices).

    The last five are for the backward, else empty.
    """
    H, N = r.shape[2:]
    plan = wkv7_plan(v, H, cu_seqlens, min_log_w)
    cu, _, chunk_start = plan["tables"]
    out = torch.empty_like(r)
    final = r.new_empty((plan["seqs"], H, N, N), dtype=torch.float32)
    u = torch.empty_like(r if save else r[:0])
    checkpoint = r.new_empty((plan["chunks"], H, N, N) if save else 0)
    sizes = (plan["T"], plan["NT"], H, v.shape[2])
    passes = r.new_empty(0, dtype=torch.float32)
    span = wkv7_span(r, log_w, plan)
    if span:
        kernels = import_module("radlads.backends.torch.kernels.wkv7_fused")
        walks, ends = triton.cdiv(plan["NT"], span), final
        if walks > 1:
            # Each walk's last state may take the place of its first.
            state, found = wkv7_starts(log_w, k, v, a, b, state, span, plan)
            ends = state
            if save:
                passes = found
        solve, a_rb = (r.new_empty((plan["chunks"], H, 64, 64) if save else 0) for _ in range(2))
        kernels.wkv7_fused_forward_kernel[(H, plan["seqs"] * walks)](
            r, log_w, k, v, a, b, state, out, u, checkpoint, solve, a_rb, ends, cu, chunk_start, plan["T"], plan["NT"], span, H,
            v.shape[2], scale, N=N,
            BN=plan["width"], CLAMP=plan["gates"]["CLAMP"], HAS_STATE=state is not None, SAVE=save,
            VARLEN=cu_seqlens is not None, num_warps=plan["width"] // 16)
        if walks > 1:
            final.copy_(ends[:, -1])
        return out, final, u, checkpoint, solve, a_rb, passes
    solve, a_rb, *factors = wkv7_solve(r, log_w, k, a, b, scale, plan)
    wkv7_scan_kernel[(triton.cdiv(N, plan["tile"]["scan"]), H, plan["seqs"])](
        v, *factors, state, out, u, checkpoint, final, cu, chunk_start, *sizes, **plan["common"], BK=64,
        BV=plan["tile"]["scan"], HAS_STATE=state is not None, SAVE=save, **plan["launch"]["scan"])
    if not (save and plan["centred"]):
        solve, a_rb = out.new_empty(0), out.new_empty(0)
    return out, final, u, checkpoint, solve, a_rb, passes


@wkv7_forward_op.register_fake
def wkv7_forward_fake(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None,
                      cu_seqlens: Tensor | None, scale: float, min_log_w: float | None, save: bool
                      ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, H, N = r.shape
    C = 64 if v.dtype == torch.bfloat16 else 32
    seqs = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = B * ((T + C - 1) // C) if cu_seqlens is None else T // C + seqs
    pairs = (chunks, H, C, C) if save and decay_block(C, min_log_w, v.dtype)[0] == C else 0
    passes = 0
    if save and r.is_cuda and cu_seqlens is None:
        plan = wkv7_plan(v, H, None, min_log_w)
        walks = -(-plan["NT"] // (wkv7_span(r, log_w, plan) or plan["NT"]))
        passes = (seqs, walks, H, N, N) if walks > 1 else 0
    return (torch.empty_like(r), r.new_empty((seqs, H, N, N), dtype=torch.float32),
            torch.empty_like(r if save else r[:0]), r.new_empty((chunks, H, N, N) if save else 0),
            r.new_empty(pairs), r.new_empty(pairs), r.new_empty(passes, dtype=torch.float32))


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::wkv7_backward", mutates_args=())
def wkv7_backward_op(d_out: Tensor, d_final: Tensor | None, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor,
                     b: Tensor, u: Tensor, checkpoint: Tensor, solve: Tensor, a_rb: Tensor, passes: Tensor,
                     cu_seqlens: Tensor | None, scale: float, min_log_w: float | None, need_state: bool
                     ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, a, b and the initial state (empty unless needed)."""
    H, N = r.shape[2:]
    Hv = v.shape[2]
    plan = wkv7_plan(v, H, cu_seqlens, min_log_w)
    cu, chunk_seq, chunk_start = plan["tables"]
    sizes = (plan["T"], plan["NT"], H)
    d_out = d_out.contiguous()
    d_final = None if d_final is None else d_final.contiguous()
    dr, dk, dv, da, db = (torch.empty_like(r) for _ in range(5))
    d_log_w = torch.empty_like(log_w)
    d_state = r.new_empty((plan["seqs"], H, N, N) if need_state else 0, dtype=torch.float32)
    du = torch.empty_like(r)
    d_checkpoint = torch.empty_like(checkpoint)
    span = wkv7_span(r, log_w, plan)
    if span:
        kernels = import_module("radlads.backends.torch.kernels.wkv7_fused")
        walks, ends = triton.cdiv(plan["NT"], span), d_state
        reads = (r, log_w, k, a, b, solve, a_rb, d_out)
        places = (cu, chunk_start, plan["T"], plan["NT"], span, H, scale)
        options = {"N": N, "BN": plan["width"], "CLAMP": plan["gates"]["CLAMP"], "VARLEN": cu is not None,
                   "num_warps": plan["width"] // 16}
        if walks > 1:
            ends = torch.empty_like(passes)
            kernels.wkv7_fused_reverse_kernel[(H, plan["seqs"] * (walks - 1))](
                *reads, None, dv, du, d_checkpoint, ends, *places, HAS_STATE=False, NEED_STATE=True, LOCAL=True, **options)
            wkv7_join(d_final, ends, passes, reverse=True)
            d_final = ends
        kernels.wkv7_fused_reverse_kernel[(H, plan["seqs"] * walks)](
            *reads, d_final, dv, du, d_checkpoint, ends, *places, HAS_STATE=d_final is not None, NEED_STATE=need_state,
            LOCAL=False, **options)
        if walks > 1 and need_state:
            d_state.copy_(ends[:, 0])
    else:
        # Of the factors only the two that cost most are kept: all together are as large as six of the inputs.
        factors = wkv7_solve(r, log_w, k, a, b, scale, plan, (solve, a_rb) if plan["centred"] else None)
        wkv7_reverse_kernel[(triton.cdiv(N, plan["tile"]["reverse"]), H, plan["seqs"])](
            *factors, d_out, d_final, du, dv, d_checkpoint, d_state, cu, chunk_start, *sizes, **plan["common"], BK=64,
            BV=plan["tile"]["reverse"], HAS_STATE=d_final is not None, NEED_STATE=need_state, **plan["launch"]["reverse"])
    arguments = (r, log_w, k, v, a, b, u, checkpoint, d_out, du, d_checkpoint, dr, d_log_w, dk, da, db,
                 cu, chunk_seq, chunk_start, *sizes, Hv, scale)
    if plan["centred"] and wkv7_has_hopper(r, log_w):
        kernels = import_module("radlads.backends.torch.kernels.wkv7_hopper")
        kernels.wkv7_hopper_grad_kernel[(triton.cdiv(N, 64), H, plan["chunks"])](
            *arguments, N=N, CLAMP=plan["gates"]["CLAMP"], CENTRED=span > 0, VARLEN=cu_seqlens is not None, num_warps=4)
    elif plan["centred"]:
        wkv7_centred_grad_kernel[(H, plan["chunks"])](
            *arguments, **plan["common"], CLAMP=plan["gates"]["CLAMP"], BK=plan["tile"]["centred_grad"], BV=plan["width"],
            **plan["launch"]["centred_grad"])
    else:
        wkv7_grad_kernel[(triton.cdiv(N, plan["tile"]["grad"]), H, plan["chunks"])](
            *arguments, **plan["common"], **plan["gates"], **plan["pairs"], BK=plan["tile"]["grad"], BV=plan["width"],
            **plan["launch"]["grad"])
    return dr, d_log_w, dk, wkv7_value_grad(dv, Hv), da, db, d_state


def wkv7_value_grad(dv: Tensor, heads: int) -> Tensor:
    """The gradient of the value heads from that of every head."""
    if heads == dv.shape[2]:
        return dv
    return dv.unflatten(2, (heads, -1)).sum(3, dtype=torch.float32).to(dv.dtype)


@wkv7_backward_op.register_fake
def wkv7_backward_fake(d_out: Tensor, d_final: Tensor | None, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor,
                       b: Tensor, u: Tensor, checkpoint: Tensor, solve: Tensor, a_rb: Tensor, passes: Tensor,
                       cu_seqlens: Tensor | None, scale: float, min_log_w: float | None, need_state: bool
                       ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, _, H, N = r.shape
    seqs = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_state = r.new_empty((seqs, H, N, N) if need_state else 0, dtype=torch.float32)
    return (*(torch.empty_like(x) for x in (r, log_w, k, v, a, b)), d_state)


def wkv7_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    r, log_w, k, v, a, b, state, cu_seqlens, ctx.scale, ctx.min_log_w, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.need_state = state is not None and state.requires_grad
    ctx.save_for_backward(r, log_w, k, v, a, b, *output[2:], cu_seqlens)


def wkv7_backward(ctx: torch.autograd.function.FunctionCtx, d_out: Tensor | None, d_final: Tensor | None, *_: None
                  ) -> tuple[Tensor | None, ...]:
    *saved, cu_seqlens = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(saved[0])
    *grads, d_state = wkv7_backward_op(d_out, d_final, *saved, cu_seqlens, ctx.scale, ctx.min_log_w, ctx.need_state)
    return *grads, d_state if ctx.need_state else None, None, None, None, None


wkv7_forward_op.register_autograd(wkv7_backward, setup_context=wkv7_setup)
