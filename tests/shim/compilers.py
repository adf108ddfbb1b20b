"""Kernels under clang: Metal's address spaces as those of OpenCL, and the CUDA spelling down to PTX."""

import shutil
import subprocess
from pathlib import Path

from radlads.backends.mlx.kernels.gpu import CUDA, METAL, GpuKernel

CLANG = next((path for name in ("clang", *(f"clang-{n}" for n in range(21, 13, -1))) if (path := shutil.which(name))), None)
METAL_PRELUDE = """
#define threadgroup __local
#define device __global
#define constant __constant
#define float4(x, y, z, w) ((float4)(x, y, z, w))
namespace metal { float exp(float x); float log(float x); float rsqrt(float x); }
float simd_shuffle_xor(float x, ushort mask);
struct mem_flags { enum Kind { mem_threadgroup }; };
void threadgroup_barrier(mem_flags::Kind);
"""
CUDA_PRELUDE = """
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
typedef unsigned int uint;
typedef unsigned long size_t;
struct uint3 { uint x, y, z; };
struct __attribute__((aligned(16))) float4 { float x, y, z, w; };
#define AXIS(register) uint(__nvvm_read_ptx_sreg_##register())
#define blockIdx (uint3{AXIS(ctaid_x), AXIS(ctaid_y), AXIS(ctaid_z)})
#define threadIdx (uint3{AXIS(tid_x), 0, 0})
#define __syncthreads() __nvvm_bar_sync(0)
#define __shfl_xor_sync(all, x, mask) __nvvm_shfl_sync_bfly_f32(all, x, mask, 31)
#define expf(x) __nvvm_ex2_approx_f(x * 1.4426950408889634f)
#define logf(x) (__nvvm_lg2_approx_f(x) * 0.6931471805599453f)
#define rsqrtf(x) __nvvm_rsqrt_approx_f(x)
__device__ inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
"""
SMALL = ("scale", "limits")  # arrays of so few elements that Metal puts them into the constant address space


def signature(kernel: GpuKernel, device: str, constant: str) -> str:
    """The kernel's arrays as parameters, all float32."""
    parameters = []
    for name in kernel.inputs:
        parameters.append(f"const {constant if name in SMALL else device} float *{name}")
        if f"{name}_shape" in kernel.source:
            parameters.append(f"const {constant} int *{name}_shape")
    return ", ".join(parameters + [f"{device} float *{name}" for name in kernel.outputs])


def complaints_as_metal(kernel: GpuKernel, constants: dict[str, int], folder: Path) -> str:
    """What the compiler says about the Metal spelling; empty when it accepts it."""
    threads = "uint3 threadgroup_position_in_grid, uint3 thread_position_in_threadgroup"
    parameters = f"{signature(kernel, '__global', '__constant')}, {threads}"
    text = METAL_PRELUDE + kernel.header + METAL.header + f"__kernel void body({parameters}) {{\n"
    text += declared(constants) + METAL.prologue + kernel.source + "}\n"
    (folder / "kernel.cl").write_text(text)
    command = [str(CLANG), "-x", "cl", "-cl-std=clc++2021", "-fsyntax-only", str(folder / "kernel.cl")]
    return subprocess.run(command, capture_output=True, text=True).stderr


def ptx(kernel: GpuKernel, constants: dict[str, int], folder: Path) -> str:
    """The PTX of the CUDA spelling; AssertionError with the compiler's words."""
    text = CUDA_PRELUDE + kernel.header + CUDA.header + f"__global__ void body({signature(kernel, '', '')}) {{\n"
    (folder / "kernel.cu").write_text(text + declared(constants) + CUDA.prologue + kernel.source + "}\n")
    command = [str(CLANG), "-x", "cuda", "--cuda-device-only", "-nocudainc", "-nocudalib", "--cuda-gpu-arch=sm_80"]
    command += ["-Wno-unknown-cuda-version", "-O3", "-S", "-o", str(folder / "kernel.ptx"), str(folder / "kernel.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return (folder / "kernel.ptx").read_text()


def declared(constants: dict[str, int]) -> str:
    """Definitions of the template's constants."""
    return "".join(f"constexpr int {name} = {value};\n" for name, value in constants.items())
