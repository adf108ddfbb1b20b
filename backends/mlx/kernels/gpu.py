"""Kernels of our own on a GPU: one source text, which a small header makes Metal or CUDA."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

# Value rows (or key columns) of one head per threadgroup; the N channels of each lie on LANES[N] neighbouring lanes.
ROWS = 32
LANES = {64: 4, 96: 8, 128: 8}

METAL_HEADER = """
#define SHARED threadgroup
#define SHARED_FLOATS threadgroup float*
#define DEVICE device
#define INLINE inline
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define SHUFFLE_XOR(x, mask) simd_shuffle_xor(x, ushort(mask))
#define EXP(x) metal::exp(x)
#define LOG(x) metal::log(x)
#define RSQRT(x) metal::rsqrt(x)
#define FLOAT4(x, y, z, w) float4(x, y, z, w)
"""
METAL_PROLOGUE = """
    const uint3 group = threadgroup_position_in_grid;
    const int me = thread_position_in_threadgroup.x;
"""
CUDA_HEADER = """
#define SHARED __shared__
#define SHARED_FLOATS float*
#define DEVICE
#define INLINE __device__ inline
#define BARRIER() __syncthreads()
#define SHUFFLE_XOR(x, mask) __shfl_xor_sync(0xffffffffu, x, mask)
#define EXP(x) expf(x)
#define LOG(x) logf(x)
#define RSQRT(x) rsqrtf(x)
#define FLOAT4(x, y, z, w) make_float4(x, y, z, w)
"""
CUDA_PROLOGUE = """
    const uint3 group = blockIdx;
    const int me = threadIdx.x;
"""
# A vector of N floats is a row of float4; lane `part` of LANES holds those numbered part, part + LANES, ...
COMMON_HEADER = """
#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < count; ++i)
INLINE float dot4(float4 x, float4 y, float sum) {
    return sum + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}
INLINE float4 times4(float4 x, float4 y) {
    return FLOAT4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w);
}
INLINE float4 plus4(float4 sum, float s, float4 x) {
    return FLOAT4(sum.x + s * x.x, sum.y + s * x.y, sum.z + s * x.z, sum.w + s * x.w);
}
INLINE float4 scaled4(float s, float4 x) {
    return FLOAT4(s * x.x, s * x.y, s * x.z, s * x.w);
}
template <int LANES>
INLINE float sum_lanes(float x) {
    for (int mask = 1; mask < LANES; mask *= 2) x += SHUFFLE_XOR(x, mask);
    return x;
}
INLINE float4 get4(const DEVICE float* p) {
    return *(const DEVICE float4*)p;
}
INLINE void put4(DEVICE float* p, float4 x) {
    *(DEVICE float4*)p = x;
}
INLINE float4 get_column4(const DEVICE float* p, int stride) {
    return FLOAT4(p[0], p[stride], p[2 * stride], p[3 * stride]);
}
template <typename T>
INLINE void put(DEVICE T* p, float x) {
    *p = T(x);
}
"""


@dataclass(frozen=True)
class Dialect:
    """How a kernel is made on one kind of GPU: MLX's function, and what comes before our text."""

    make: Callable[..., Any]
    header: str
    prologue: str


METAL = Dialect(mx.fast.metal_kernel, METAL_HEADER + COMMON_HEADER, METAL_PROLOGUE)
CUDA = Dialect(mx.fast.cuda_kernel, CUDA_HEADER + COMMON_HEADER, CUDA_PROLOGUE)


def dialect() -> Dialect | None:
    """The dialect of the default device; None on a CPU."""
    if mx.default_device() != mx.gpu:
        return None
    return METAL if mx.metal.is_available() else CUDA


def has_kernels(head_size: int) -> bool:
    """Whether the default device runs our kernels for heads of this size."""
    return head_size in LANES and dialect() is not None


@dataclass(frozen=True)
class GpuKernel:
    """A kernel body with the names of its arrays; `header` holds #define lines that choose a variant."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = ""

    def __call__(
        self,
        arrays: Sequence[mx.array],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
        *,
        groups: tuple[int, int, int],
        **constants: int | bool,
    ) -> list[mx.array]:
        """The outputs, of the given shapes and dtypes; `groups` threadgroups of ROWS * LANES threads each."""
        threads = ROWS * constants["LANES"]
        return compiled(self, dialect())(
            inputs=list(arrays),
            output_shapes=[tuple(shape) for shape in shapes],
            output_dtypes=list(dtypes),
            grid=(groups[0] * threads, groups[1], groups[2]),
            threadgroup=(threads, 1, 1),
            template=[("ROWS", ROWS), *constants.items()],
        )


@lru_cache
def compiled(kernel: GpuKernel, made: Dialect) -> Any:
    """MLX's kernel object; MLX compiles it when it first runs with given constants and types."""
    return made.make(
        name="radlads_" + kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=made.prologue + kernel.source,
        header=kernel.header + made.header,
    )


@lru_cache
def constant(*values: float) -> mx.array:
    """A float32 array of numbers that a kernel reads; made once."""
    return mx.array(values, mx.float32)
