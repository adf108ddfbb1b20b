"""One token of a few rows through a layer by few kernels: what Rows.step takes where a layer has them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from radlads.backends.torch.kernels.lang import HAS_TRITON
from radlads.backends.torch.kernels.layer_step import (
    add_linear_kernel,
    expand_kernel,
    gated_units_kernel,
    mix_kernel,
    project_kernel,
)
from radlads.backends.torch.kernels.layer_step_rwkv6 import (
    decay_kernel,
    mix6_kernel,
    project_shifted_kernel,
    shift_kernel,
    shift_low_kernel,
)
from radlads.backends.torch.kernels.prologue import RWKV7_MIN_LOG_W
from radlads.backends.torch.layers import FeedForward
from radlads.backends.torch.mixers.rwkv6 import Rwkv6Mixer
from radlads.backends.torch.mixers.rwkv7 import Rwkv7Mixer
from radlads.backends.torch.model import Model
from radlads.backends.torch.state import LayerState, MixContext

# Rows up to which this was faster than the modules on an H100, by kind of mixer; those of RAD-RWKV6 are not measured yet. The
# kernels serve eight, but these are faster as matrix products.
MOST_ROWS = {"softmax": 1, "rwkv7": 1, "rwkv6": 0}


def step_has_kernels(model: Model, count: int) -> bool:
    """Whether the kernels here serve `count` rows of this model in all of its layers but softmax attention."""
    layers: list[Any] = list(model.model.layers)
    mixed = [layer.self_attn for layer, mixer in zip(layers, model.spec.mixers, strict=True) if mixer != "softmax"]
    return (
        runs_kernels(model.head) and all(count <= MOST_ROWS.get(mixer, 0) for mixer in model.spec.mixers)
        and all(type(layer.mlp) is FeedForward and is_plain(*layer.mlp.children()) for layer in layers)
        and all(covers(mixer) and is_plain(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj) for mixer in mixed)
    )  # fmt: skip


def runs_kernels(weight: Tensor) -> bool:
    return HAS_TRITON and weight.is_cuda


def covers(mixer: Any) -> bool:
    """Whether the kernels know what this mixer does between its matrices."""
    spec, opts = mixer.spec, mixer.spec.mixer
    if opts.groupnorm or spec.qk_norm or spec.Ckv % 4:
        return False
    if type(mixer) is Rwkv6Mixer:
        return opts.token_shift and opts.gate == "full" and is_plain(mixer.gate)
    return type(mixer) is Rwkv7Mixer and opts.variant == "C" and opts.gate == "lowrank"


def is_plain(*modules: Any) -> bool:
    """Whether these are linear layers and nothing else: no adapters, no quantised weights."""
    return all(type(module) is nn.Linear for module in modules)


def programs_of(size: int, part: int) -> int:
    return -(-size // part)


def power_of_two(size: int) -> int:
    """The smallest one that is not below `size`."""
    return 1 << (size - 1).bit_length()


def launch_sizes(count: int) -> dict[str, int]:
    rows = power_of_two(count)
    return {"M": rows, "ROWS": 4, "BK": 512 if rows <= 2 else 256}


def launch_columns(count: int) -> int:
    """Columns of a low-rank matrix in a program."""
    return 8 if count <= 4 else 4


def mixed_step(layer: Any, x: Tensor, context: MixContext, held: LayerState) -> Tensor:
    """x (B, D) plus the mixer of its norm; the states `held`, or those of them in context.slots, in place."""
    return (mixed_rwkv6 if type(layer.self_attn) is Rwkv6Mixer else mixed_rwkv7)(layer, x, context, held)


def places(context: MixContext, held: LayerState) -> tuple[Tensor | None, dict[str, Any]]:
    """Slots of the rows and the constants of a kernel that reads states and angles."""
    slots, cos = context.slots, context.cos_sin[0]
    angles = cos.shape[-1] if cos.shape[0] > 1 else 0
    return slots, {"pool": len(held["wkv"]), "ANGLES": angles, "HAS_SLOTS": slots is not None}


def mixed_rwkv7(layer: Any, x: Tensor, context: MixContext, held: LayerState) -> Tensor:
    """mixed_step of RAD-RWKV7."""
    mixer, spec = layer.self_attn, layer.self_attn.spec
    count, D = x.shape
    ranks = {"RW": mixer.w1.shape[1], "RA": mixer.a1.shape[1], "RV": mixer.v1.shape[1], "RG": mixer.g1.shape[1]}
    sizes = launch_sizes(count)
    wide, columns = spec.C + 2 * spec.Ckv, launch_columns(count)
    qkv = x.new_empty((count, wide), dtype=torch.float32)
    low = x.new_empty((count, sum(ranks.values())), dtype=torch.float32)
    parts = x.new_empty((4, count, spec.C), dtype=torch.float32)
    mixes = "v_first" in context.carry
    first = context.carry.setdefault("v_first", qkv)
    q, k, v, o = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj
    programs = programs_of(wide, sizes["ROWS"]) + sum(programs_of(r, columns) for n, r in ranks.items() if mixes or n != "RV")
    project_kernel[(programs,)](
        x, layer.input_layernorm.weight, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias, mixer.w1, mixer.a1, mixer.v1,
        mixer.g1, qkv, low, count, layer.input_layernorm.eps, K=D, C=spec.C, CKV=spec.Ckv, **ranks, **sizes, COLS=columns,
        BIAS=spec.qkv_bias)
    expand_kernel[(programs_of(spec.C, 64), 3 + mixes, count)](
        low, mixer.w0, mixer.w2, mixer.a0, mixer.a2, mixer.g2, mixer.v0, mixer.v2, parts, count, C=spec.C, **ranks, COLS=64,
        BR=32)
    mixed = x.new_empty((count, spec.C))
    cos, sin = context.cos_sin
    slots, where = places(context, held)
    mix_kernel[(programs_of(spec.N, 4), spec.H, count)](
        qkv, parts, cos, sin, first, held["wkv"], slots, mixed, count, low=RWKV7_MIN_LOG_W, scale=spec.N**-0.5, H=spec.H,
        HKV=spec.Hkv, N=spec.N, BN=power_of_two(spec.N), BV=4, ROPE=spec.mixer.rope, MIX_FIRST=mixes, **where, num_warps=1)
    return added(x, mixed, o)


def mixed_rwkv6(layer: Any, x: Tensor, context: MixContext, held: LayerState) -> Tensor:
    """mixed_step of RAD-RWKV6."""
    mixer, spec, norm = layer.self_attn, layer.self_attn.spec, layer.input_layernorm
    count, D = x.shape
    sizes, columns = launch_sizes(count), launch_columns(count)
    shift_rank, rank = mixer.time_maa_w2.shape[1], mixer.time_decay_w1.shape[1]
    wide = 2 * (spec.C + spec.Ckv)
    slots, where = places(context, held)
    seat = {"pool": where["pool"], "HAS_SLOTS": where["HAS_SLOTS"]}
    shifted = x.new_empty((count, 5 * shift_rank), dtype=torch.float32)
    mixes = x.new_empty((5, count, D))
    qkvg = x.new_empty((count, wide), dtype=torch.float32)
    low = x.new_empty((count, rank), dtype=torch.float32)
    log_w = x.new_empty((count, spec.C), dtype=torch.float32)
    mixed = x.new_empty((count, spec.C))
    shift_low_kernel[(programs_of(5 * shift_rank, 8), count)](
        x, norm.weight, held["shift"], slots, mixer.time_maa_x, mixer.time_maa_w1, shifted, eps=norm.eps, K=D,
        WIDTH=5 * shift_rank, COLS=8, BK=256, **seat)
    shift_kernel[(programs_of(D, 32), count)](
        x, norm.weight, held["shift"], slots, shifted, mixer.time_maa_w2, mixer.time_maa_r, mixer.time_maa_k,
        mixer.time_maa_v, mixer.time_maa_w, mixer.time_maa_g, mixes, count, eps=norm.eps, K=D, R=shift_rank, COLS=32, BR=32,
        BK=1024, **seat)
    q, k, v, o, gate = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj, mixer.gate
    project_shifted_kernel[(programs_of(wide, sizes["ROWS"]) + programs_of(rank, columns),)](
        mixes, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias, gate.weight, mixer.time_decay_w1, qkvg, low, count, K=D,
        C=spec.C, CKV=spec.Ckv, R=rank, **sizes, COLS=columns, BIAS=spec.qkv_bias)
    clamp = -math.inf if spec.mixer.clamp is None else spec.mixer.clamp
    decay_kernel[(programs_of(spec.C, 64), count)](
        low, mixer.time_decay, mixer.time_decay_w2, log_w, clamp, C=spec.C, R=rank, COLS=64, BR=32)
    cos, sin = context.cos_sin
    mix6_kernel[(programs_of(spec.N, 4), spec.H, count)](
        qkvg, log_w, cos, sin, held["wkv"], slots, mixed, scale=spec.N**-0.5, H=spec.H, HKV=spec.Hkv, N=spec.N,
        BN=power_of_two(spec.N), BV=4, ROPE=spec.mixer.rope, BALANCE=spec.mixer.balance, **where, num_warps=1)
    return added(x, mixed, o)


def fed_step(layer: Any, x: Tensor) -> Tensor:
    """x (B, D) plus the feed-forward of its norm."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    gate, up = mlp.gate_proj, mlp.up_proj
    count, D = x.shape
    units = x.new_empty((count, gate.weight.shape[0]))
    sizes = launch_sizes(count)
    gated_units_kernel[(programs_of(units.shape[1], sizes["ROWS"]),)](
        x, norm.weight, gate.weight, gate.bias, up.weight, up.bias, units, units.shape[1], count, norm.eps, K=D, **sizes,
        BIAS=gate.bias is not None)
    return added(x, units, mlp.down_proj)


def added(x: Tensor, y: Tensor, linear: nn.Linear) -> Tensor:
    """x (B, D) plus linear(y)."""
    out, sizes = torch.empty_like(x), launch_sizes(len(x))
    rows, K = linear.weight.shape
    add_linear_kernel[(programs_of(rows, sizes["ROWS"]),)](
        y, linear.weight, linear.bias, x, out, rows, len(x), K=K, **sizes, BIAS=linear.bias is not None)
    return out
