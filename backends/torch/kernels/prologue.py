"""The recurrences from a mixer's projections: log-decays, keys, mixed values and the output gate, each in one pass over memory.

Equations 6.4, 6.5, 7.2 to 7.5, H.2, H.3, H.6 and H.7 of docs/mixers.md, the logistic gates of 6.8 and 7.9, and `wkv6_raw` and
`wkv7_raw`, which put the recurrences between them. Kernels are in prologue_triton; the plain forms are the mixers' own.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch.kernels.lang import HAS_TRITON, OPERATOR_NAMESPACE, triton
from radlads.backends.torch.kernels.prologue_triton import (
    blend_grad_kernel,
    blend_kernel,
    keys6_grad_kernel,
    keys6_kernel,
    keys7_grad_kernel,
    keys7_kernel,
)
from radlads.backends.torch.kernels.wkv6 import wkv6
from radlads.backends.torch.kernels.wkv6_plain import repeat_heads
from radlads.backends.torch.kernels.wkv7 import wkv7

# Whether the mixers take the kernels; off until measured on a card: the compiler fuses most of the plain forms too.
FUSED_PROLOGUE = False

# 7.2, H.2: no decay is stronger than exp(-exp(-1/2)) per token.
RWKV7_MIN_LOG_W = -math.exp(-0.5)

# How RWKV-7 makes its keys: variant C and hxa07C; hxa079, 07A and 07B; variant B; variant A.
KEY_FORMS = ("decay", "log", "scaled", "scaled_rate")
# Values of a tile: 16 bytes of bfloat16 a thread.
PROLOGUE_TILE = 1024


def wkv6_raw(q: Tensor, d: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, scale: float,
             clamp: float | None = None, balance: bool = True, gate: Tensor | None = None, cu_seqlens: Tensor | None = None
             ) -> tuple[Tensor, Tensor]:
    """wkv6 of log_w = max(-exp(d), clamp) and, with `balance`, of the keys k * (1 - exp(log_w)); out times sigmoid(gate).

    q, d, gate: (B, T, H, N); k, v: (B, T, Hkv, N) with H % Hkv == 0; float32 or bfloat16. scale, state and cu_seqlens as wkv6
    has them. Returns out (B, T, H, N) in v's dtype and the final state. Raises ValueError for shapes that do not fit.
    """
    prologue_check(q, k, v, d=d, gate=gate)
    fused = prologue_has_kernel(k)
    log_w, k = wkv6_keys(d, k, clamp=clamp, balance=balance, fused=fused)
    out, final = wkv6(q, k, repeat_heads(v, k.shape[2]), log_w.to(k.dtype), state, scale=scale, min_log_w=clamp,
                      cu_seqlens=cu_seqlens)
    return out if gate is None else blended(None, out, gate, fused=fused), final


def wkv7_raw(r: Tensor, d: Tensor, k: Tensor, v: Tensor, a: Tensor, state: Tensor | None = None, *, form: str = "decay",
             k_k: Tensor | None = None, k_a: Tensor | None = None, v_first: Tensor | None = None, v_mix: Tensor | None = None,
             gate: Tensor | None = None, scale: float = 1.0, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """wkv7 of what `wkv7_keys` makes of d, k and a, and of the values v + (v_first - v) sigmoid(v_mix); out times sigmoid(gate).

    r, d, a, v_mix, gate: (B, T, H, N); k, v, v_first: (B, T, Hkv, N) with H % Hkv == 0; float32 or bfloat16. Without v_first
    the values are v. scale, state and cu_seqlens as wkv7 has them. Returns out (B, T, H, N) in v's dtype and the final state.
    Raises ValueError for shapes that do not fit, for an unknown form, and where one of v_first and v_mix is missing.
    """
    prologue_check(r, k, v, d=d, a=a, v_mix=v_mix, gate=gate)
    fused = prologue_has_kernel(k)
    log_w, k, removal, rate = wkv7_keys(d, k, a, form, k_k, k_a, fused=fused)
    if (v_first is None) != (v_mix is None):
        raise ValueError("v_first and v_mix go together")
    if v_first is not None and v_mix is not None:
        if v_first.shape != v.shape:
            raise ValueError(f"v_first must have v's shape {tuple(v.shape)}, got {tuple(v_first.shape)}")
        v = blended(v, v_first, v_mix, fused=fused)
    out, final = wkv7(r, log_w.to(k.dtype), k, v, removal, rate, state, scale=scale, min_log_w=RWKV7_MIN_LOG_W,
                      cu_seqlens=cu_seqlens)
    return out if gate is None else blended(None, out, gate, fused=fused), final


def wkv6_keys(d: Tensor, k: Tensor, *, clamp: float | None, balance: bool, fused: bool) -> tuple[Tensor, Tensor]:
    """6.4, 6.5: decay logits d (B, T, H, N), keys k (B, T, Hkv, N) to log_w and the keys (B, T, H, N).

    fused: by one kernel, where log_w has k's dtype; else it is float32. Without `balance` keys stay as they are.
    """
    if fused:
        log_w, written = wkv6_keys_op(d, k, clamp, balance)
        return log_w, written if balance else k
    log_w = -d.float().exp()
    if clamp is not None:
        log_w = log_w.clamp(min=clamp)
    if balance:
        k = repeat_heads(k, d.shape[2])
        k = (k * -torch.expm1(log_w)).to(k.dtype)  # 1 - w without cancellation
    return log_w, k


def wkv7_keys(d: Tensor, k: Tensor, a: Tensor, form: str, k_k: Tensor | None = None, k_a: Tensor | None = None, *, fused: bool
              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """7.2 to 7.4, H.2, H.3, H.6, H.7: (B, T, H, N) log_w, written keys, removal keys -kappa and kappa times its rates, beta.

    d, a: (B, T, H, N), logits of decays and of rates. k: (B, T, Hkv, N). form: one of KEY_FORMS; the scaled ones take k_k and
    k_a, H*N values each. fused: by one kernel, where log_w has k's dtype; else it is float32.
    """
    if form not in KEY_FORMS:
        raise ValueError(f"form must be one of {', '.join(KEY_FORMS)}, got {form!r}")
    if form.startswith("scaled") != (k_k is not None and k_a is not None):
        raise ValueError(f"form {form!r} with{'out' if k_k is None or k_a is None else ''} k_k and k_a")
    if fused:
        return wkv7_keys_op(d, k, a, k_k, k_a, form)
    # Logits in the layout their products have: so do their gradients, which then need no copy.
    heads, d = d.shape[2:], d.flatten(2).float()
    log_w = (RWKV7_MIN_LOG_W * torch.sigmoid(d)).unflatten(-1, heads)
    a = torch.sigmoid(a.flatten(2)).unflatten(-1, heads)
    k = repeat_heads(k, heads[0])
    if k_k is not None and k_a is not None:
        kappa = unit(k * k_k.view(k.shape[2:]))
        key_scale = 1 + (a - 1) * k_a.view(k.shape[2:])
        return log_w, k * key_scale, -kappa, kappa * (key_scale if form == "scaled_rate" else a)
    kappa = unit(k)
    if form == "log":
        return log_w, k * (1.5 + F.softplus(-d).unflatten(-1, heads) + a).to(k.dtype), -kappa, kappa * a  # 1 - L + a
    return log_w, k * (a - torch.expm1(log_w).to(a.dtype)), -kappa, kappa * a  # 1 - w + a


def blended(x: Tensor | None, y: Tensor, share: Tensor, *, fused: bool) -> Tensor:
    """7.5 and logistic gates: x + (y - x) sigmoid(share), where no x is 0; x, y (B, T, Hkv, N) repeated to share's heads."""
    if fused:
        return blend_op(x, y, share)
    y = repeat_heads(y, share.shape[2])
    share = torch.sigmoid(share)
    return y * share if x is None else torch.lerp(repeat_heads(x, share.shape[2]), y, share)


def unit(k: Tensor) -> Tensor:
    """7.4, H.6: k (..., N) over its norm, at least 1e-12, computed in float32."""
    return F.normalize(k.float(), dim=-1, eps=1e-12).to(k.dtype)


def prologue_has_kernel(k: Tensor) -> bool:
    return HAS_TRITON and k.is_cuda and k.dtype in (torch.float32, torch.bfloat16) and k.numel() > 0


def mixer_is_fused(k: Tensor) -> bool:
    """Whether a mixer with these keys takes the kernels."""
    return FUSED_PROLOGUE and prologue_has_kernel(k)


def prologue_check(r: Tensor, k: Tensor, v: Tensor, **others: Tensor | None) -> None:
    B, T, H, N = r.shape
    for name, x in others.items():
        if x is not None and x.shape != r.shape:
            raise ValueError(f"{name} must have the shape of the queries {tuple(r.shape)}, got {tuple(x.shape)}")
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.shape[3] != N or H % k.shape[2]:
        raise ValueError(f"k and v must be (B, T, Hkv, N) with H % Hkv == 0, got {tuple(k.shape)} and {tuple(v.shape)} "
                         f"beside queries {tuple(r.shape)}")


def by_tokens(x: Tensor) -> tuple[Tensor, int]:
    """x (B, T, heads, N) and how far apart its tokens are in memory; copied only where its heads are not side by side."""
    _, T, heads, N = x.shape
    if x.stride(3) == 1 and x.stride(2) == N and x.stride(0) == T * x.stride(1):
        return x, x.stride(1)
    return x.contiguous(), heads * N


def prologue_launch(wide: Tensor, shared: Tensor) -> tuple[tuple[int, int], tuple[int, int], dict[str, int]]:
    """The grid, the sizes and the constants for tensors of H heads and others of fewer."""
    B, T, H, N = wide.shape
    width = triton.next_power_of_2(N)
    rows = max(1, PROLOGUE_TILE // width)
    constants = {"GROUP": H // shared.shape[2], "N": N, "BN": width, "ROWS": rows, "num_warps": 4}
    return (triton.cdiv(B * T, rows), shared.shape[2]), (B * T, H), constants


def like_heads(like: Tensor, heads: int) -> Tensor:
    """Uninitialised and contiguous (B, T, heads, N) in `like`'s dtype."""
    B, T, _, N = like.shape
    return like.new_empty((B, T, heads, N))


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::wkv6_keys", mutates_args=())
def wkv6_keys_op(d: Tensor, k: Tensor, clamp: float | None, balance: bool) -> tuple[Tensor, Tensor]:
    """(log_w, written keys), the second empty without `balance`."""
    d = d.contiguous()
    k, step = by_tokens(k)
    log_w, written = wkv6_keys_fake(d, k, clamp, balance)
    grid, (tokens, H), constants = prologue_launch(d, k)
    keys6_kernel[grid](
        d, k, log_w, written, tokens, step, clamp or 0.0, H, CLAMPED=clamp is not None, BALANCE=balance, **constants)
    return log_w, written


@wkv6_keys_op.register_fake
def wkv6_keys_fake(d: Tensor, k: Tensor, clamp: float | None, balance: bool) -> tuple[Tensor, Tensor]:
    H = d.shape[2]
    return like_heads(k, H), like_heads(k, H) if balance else k.new_empty(0)


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::wkv6_keys_backward", mutates_args=())
def wkv6_keys_backward_op(d_log_w: Tensor, d_written: Tensor, d: Tensor, k: Tensor, clamp: float | None, balance: bool
                          ) -> tuple[Tensor, Tensor]:
    """Gradients of d and k, the second empty without `balance`."""
    dd, dk = wkv6_keys_backward_fake(d_log_w, d_written, d, k, clamp, balance)
    d = d.contiguous()
    k, step = by_tokens(k)
    grid, (tokens, H), constants = prologue_launch(d, k)
    keys6_grad_kernel[grid](
        d_log_w.contiguous(), d_written.contiguous(), d, k, dd, dk, tokens, step, clamp or 0.0, H, CLAMPED=clamp is not None,
        BALANCE=balance, **constants)
    return dd, dk


@wkv6_keys_backward_op.register_fake
def wkv6_keys_backward_fake(d_log_w: Tensor, d_written: Tensor, d: Tensor, k: Tensor, clamp: float | None, balance: bool
                            ) -> tuple[Tensor, Tensor]:
    return like_heads(d, d.shape[2]), like_heads(k, k.shape[2]) if balance else k.new_empty(0)


def wkv6_keys_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    d, k, ctx.clamp, ctx.balance = inputs
    ctx.save_for_backward(d, k)


def wkv6_keys_backward(ctx: torch.autograd.function.FunctionCtx, d_log_w: Tensor, d_written: Tensor
                       ) -> tuple[Tensor | None, ...]:
    dd, dk = wkv6_keys_backward_op(d_log_w, d_written, *ctx.saved_tensors, ctx.clamp, ctx.balance)
    return dd, dk if ctx.balance else None, None, None


wkv6_keys_op.register_autograd(wkv6_keys_backward, setup_context=wkv6_keys_setup)


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::wkv7_keys", mutates_args=())
def wkv7_keys_op(d: Tensor, k: Tensor, a: Tensor, k_k: Tensor | None, k_a: Tensor | None, form: str
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_w, written keys, -kappa, beta)."""
    d, a = d.contiguous(), a.contiguous()
    k, step = by_tokens(k)
    outputs = wkv7_keys_fake(d, k, a, k_k, k_a, form)
    grid, (tokens, H), constants = prologue_launch(d, k)
    scales = [None if x is None else x.contiguous() for x in (k_k, k_a)]
    keys7_kernel[grid](d, k, a, *scales, *outputs, tokens, step, RWKV7_MIN_LOG_W, H, FORM=form, **constants)
    return outputs


@wkv7_keys_op.register_fake
def wkv7_keys_fake(d: Tensor, k: Tensor, a: Tensor, k_k: Tensor | None, k_a: Tensor | None, form: str
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H = d.shape[2]
    return like_heads(k, H), like_heads(k, H), like_heads(k, H), like_heads(k, H)


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::wkv7_keys_backward", mutates_args=())
def wkv7_keys_backward_op(d_log_w: Tensor, d_written: Tensor, d_removal: Tensor, d_rate: Tensor, d: Tensor, k: Tensor,
                          a: Tensor, k_k: Tensor | None, k_a: Tensor | None, form: str
                          ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of d, k, a, k_k and k_a, the last two empty where there are none."""
    dd, dk, da = (like_heads(x, x.shape[2]) for x in (d, k, a))
    d, a = d.contiguous(), a.contiguous()
    k, step = by_tokens(k)
    grid, (tokens, H), constants = prologue_launch(d, k)
    scales = [None if x is None else x.contiguous() for x in (k_k, k_a)]
    d_scales = d.new_empty((grid[0], 2, H, d.shape[3]) if k_k is not None else 0, dtype=torch.float32)
    keys7_grad_kernel[grid](
        *(x.contiguous() for x in (d_log_w, d_written, d_removal, d_rate)), d, k, a, *scales, dd, dk, da, d_scales, tokens, step,
        RWKV7_MIN_LOG_W, H, FORM=form, **constants)
    if k_k is None or k_a is None:
        return dd, dk, da, d.new_empty(0), d.new_empty(0)
    dk_k, dk_a = (part.sum(0).view(x.shape).to(x.dtype) for part, x in zip(d_scales.unbind(1), (k_k, k_a), strict=True))
    return dd, dk, da, dk_k, dk_a


@wkv7_keys_backward_op.register_fake
def wkv7_keys_backward_fake(d_log_w: Tensor, d_written: Tensor, d_removal: Tensor, d_rate: Tensor, d: Tensor, k: Tensor,
                            a: Tensor, k_k: Tensor | None, k_a: Tensor | None, form: str
                            ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scales = (d.new_empty(0) if x is None else x.new_empty(x.shape) for x in (k_k, k_a))
    return (*(like_heads(x, x.shape[2]) for x in (d, k, a)), *scales)


def wkv7_keys_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    *saved, ctx.form = inputs
    ctx.save_for_backward(*saved)


def wkv7_keys_backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    dd, dk, da, *d_scales = wkv7_keys_backward_op(*grads, *ctx.saved_tensors, ctx.form)
    return dd, dk, da, *(d_scales if ctx.saved_tensors[3] is not None else (None, None)), None


wkv7_keys_op.register_autograd(wkv7_keys_backward, setup_context=wkv7_keys_setup)


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::blend", mutates_args=())
def blend_op(x: Tensor | None, y: Tensor, share: Tensor) -> Tensor:
    """x + (y - x) sigmoid(share)."""
    out = blend_fake(x, y, share)
    tensors, steps = zip(*(by_tokens(t) for t in (y if x is None else x, y, share)), strict=True)
    grid, (tokens, H), constants = prologue_launch(share, y)
    blend_kernel[grid](*tensors, out, tokens, *steps, H, HAS_X=x is not None, **constants)
    return out


@blend_op.register_fake
def blend_fake(x: Tensor | None, y: Tensor, share: Tensor) -> Tensor:
    return like_heads(y, share.shape[2])


@torch.library.custom_op(f"{OPERATOR_NAMESPACE}::blend_backward", mutates_args=())
def blend_backward_op(d_out: Tensor, x: Tensor | None, y: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty where there is none), y and share."""
    dx, dy, d_share = blend_backward_fake(d_out, x, y, share)
    tensors, steps = zip(*(by_tokens(t) for t in (y if x is None else x, y, share)), strict=True)
    grid, (tokens, H), constants = prologue_launch(share, y)
    blend_grad_kernel[grid](d_out.contiguous(), *tensors, dx, dy, d_share, tokens, *steps, H, HAS_X=x is not None, **constants)
    return dx, dy, d_share


@blend_backward_op.register_fake
def blend_backward_fake(d_out: Tensor, x: Tensor | None, y: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx = y.new_empty(0) if x is None else like_heads(x, x.shape[2])
    return dx, like_heads(y, y.shape[2]), like_heads(share, share.shape[2])


def blend_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def blend_backward(ctx: torch.autograd.function.FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
    dx, dy, d_share = blend_backward_op(d_out, *ctx.saved_tensors)
    return None if ctx.saved_tensors[0] is None else dx, dy, d_share


blend_op.register_autograd(blend_backward, setup_context=blend_setup)
