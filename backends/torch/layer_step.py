"""One token of a few rows through a layer by few kernels: what Rows.step takes where a layer has them."""

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
from radlads.backends.torch.kernels.prologue import RWKV7_MIN_LOG_W
from radlads.backends.torch.layers import FeedForward
from radlads.backends.torch.mixers.rwkv7 import Rwkv7Mixer
from radlads.backends.torch.model import Model
from radlads.backends.torch.state import MixContext
from radlads.spec import ModelSpec

# Rows up to which this was faster than the modules on an H100. The kernels serve eight, but these are faster as matrix products.
MOST_ROWS = 1


def step_has_kernels(model: Model, count: int) -> bool:
    """Whether the kernels here serve `count` rows of this model in all of its layers but softmax attention."""
    layers: list[Any] = list(model.model.layers)
    mixed = [layer.self_attn for layer, mixer in zip(layers, model.spec.mixers, strict=True) if mixer != "softmax"]
    return (
        runs_kernels(model.head) and count <= MOST_ROWS
        and all(type(layer.mlp) is FeedForward and is_plain(*layer.mlp.children()) for layer in layers)
        and all(type(mixer) is Rwkv7Mixer and is_plain(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj) for mixer in mixed)
        and covers(model.spec)
    )  # fmt: skip


def runs_kernels(weight: Tensor) -> bool:
    return HAS_TRITON and weight.is_cuda


def covers(spec: ModelSpec) -> bool:
    """Whether the kernels know what this model does between its matrices."""
    opts = spec.mixer
    return opts.variant == "C" and opts.gate == "lowrank" and not opts.groupnorm and not spec.qk_norm and spec.Ckv % 4 == 0


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


def mixed_step(layer: Any, x: Tensor, context: MixContext, wkv: Tensor) -> Tensor:
    """x (B, D) plus the mixer of its norm; wkv (B, H, N, N) in place."""
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
    mix_kernel[(programs_of(spec.N, 4), spec.H, count)](
        qkv, parts, cos, sin, first, wkv, mixed, count, RWKV7_MIN_LOG_W, spec.N**-0.5, H=spec.H, HKV=spec.Hkv, N=spec.N,
        BN=power_of_two(spec.N), BV=4, ROPE=spec.mixer.rope, MIX_FIRST=mixes, num_warps=1)
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
