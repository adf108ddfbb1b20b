"""GPU kernels without a GPU: MLX's kernel functions played by a C++ compiler, on the same source text and arguments."""

import ctypes
import hashlib
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
import numpy as np

from radlads.backends.mlx.kernels.gpu import CUDA, METAL, Dialect

HEADER = Path(__file__).with_name("gpu.h")
FOLDER = Path(mkdtemp(prefix="radlads-shim-"))
METAL_TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16_t", mx.float16: "float16_t", mx.bool_: "bool", mx.int32: "int"}
CUDA_TYPES = METAL_TYPES | {mx.bfloat16: "__nv_bfloat16", mx.float16: "__half"}
BITS = {4: np.uint32, 2: np.uint16, 1: np.uint8}
GUARD = 1024  # elements before and after each array: NaN to read, and not to be written
FAULTS = {1: "threads of a group stand at different barriers", 2: "more than 32 KB of threadgroup memory"}
# Metal passes arrays of fewer elements in the constant address space.
SMALLEST_DEVICE_ARRAY = 8


class ShimKernel:
    """What mx.fast.metal_kernel or mx.fast.cuda_kernel returns; `backwards` resumes threads in descending order."""

    def __init__(
        self, cuda: bool, backwards: bool, *, name: str, input_names: list[str], output_names: list[str], source: str, header: str
    ) -> None:
        self.cuda, self.backwards, self.name = cuda, backwards, name
        self.inputs, self.outputs, self.source, self.header = input_names, output_names, source, header
        self.shaped = [name for name in input_names if f"{name}_shape" in source]

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: list[tuple[str, Any]],
    ) -> list[mx.array]:
        """Run; RuntimeError for what a GPU would not forgive."""
        assert (len(inputs), len(output_shapes)) == (len(self.inputs), len(self.outputs)) == (len(inputs), len(output_dtypes))
        assert grid[0] % threadgroup[0] == 0 and threadgroup[1:] == (1, 1) and threadgroup[0] % 32 == 0
        assert threadgroup[0] <= 1024, "more threads than a threadgroup holds"
        text = self.text(inputs, output_dtypes, template)
        held = [guarded(x) for x in inputs]
        held += [guarded(mx.full(shape, np.nan, dtype)) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        edges = [edge(buffer) for buffer in held]
        pointers = (ctypes.c_void_p * len(held))(*(x.ctypes.data + GUARD * x.itemsize for x in held))
        shapes = [np.array(x.shape, np.int32) for x in inputs]
        shape_pointers = (ctypes.c_void_p * len(shapes))(*(x.ctypes.data for x in shapes))
        groups = (grid[0] // threadgroup[0], grid[1], grid[2])
        status = build(text)(pointers, shape_pointers, *groups, threadgroup[0], int(self.backwards))
        if status:
            raise RuntimeError(f"{self.name}: {FAULTS[status]}")
        for name, buffer, before in zip([*self.inputs, *self.outputs], held, edges, strict=True):
            if not np.array_equal(edge(buffer), before):
                raise RuntimeError(f"{self.name}: wrote outside {name}")
        results = held[len(inputs) :]
        return [
            mx.array(buffer[GUARD:-GUARD].reshape(shape)).view(dtype)
            for buffer, shape, dtype in zip(results, output_shapes, output_dtypes, strict=True)
        ]

    def text(self, inputs: list[mx.array], output_dtypes: list[mx.Dtype], template: list[tuple[str, Any]]) -> str:
        """The C++ source: our text between a signature as MLX writes it and a C entry."""
        types = CUDA_TYPES if self.cuda else METAL_TYPES
        parameters, arguments = [], []
        for i, (name, x) in enumerate(zip(self.inputs, inputs, strict=True)):
            space = "constant" if x.size < SMALLEST_DEVICE_ARRAY else "device"
            parameters.append(f"const {space} {types[x.dtype]} *{name}")
            arguments.append(f"(const {types[x.dtype]} *)arrays[{i}]")
            if name in self.shaped:
                parameters.append(f"const constant int *{name}_shape")
                arguments.append(f"(const int *)shapes[{i}]")
        for i, (name, dtype) in enumerate(zip(self.outputs, output_dtypes, strict=True), len(inputs)):
            parameters.append(f"device {types[dtype]} *{name}")
            arguments.append(f"({types[dtype]} *)arrays[{i}]")
        constants = "".join(f"constexpr int {name} = {int(value)};\n" for name, value in template)
        return (
            f'#include "{HEADER}"\n{self.header}\n#undef SHARED\n#define SHARED GROUP_MEMORY\n'
            f'static void kernel_body({", ".join(parameters)}) {{\n{constants}\n#line 1 "{self.name}"\n{self.source}\n}}\n'
            "static void **arrays, **shapes;\n"
            f"static void bound() {{ kernel_body({', '.join(arguments)}); }}\n"
            'extern "C" int run(void **a, void **s, uint x, uint y, uint z, uint threads, int backwards) {\n'
            "    arrays = a, shapes = s;\n    return run_groups({x, y, z}, threads, backwards, bound);\n}\n"
        )


def shim(cuda: bool = False, backwards: bool = False) -> Dialect:
    """The dialect that stands in for a Mac's GPU or for NVIDIA's."""

    def make(**arguments: Any) -> ShimKernel:
        return ShimKernel(cuda, backwards, **arguments)

    return replace(CUDA if cuda else METAL, make=make)


def guarded(x: mx.array) -> np.ndarray:
    """The bits of an array with GUARD elements of ones (NaN for floats) before and after."""
    kind = BITS[x.dtype.size]
    bits = np.array(x.view({4: mx.uint32, 2: mx.uint16, 1: mx.uint8}[x.dtype.size])).reshape(-1)
    ones = np.full(GUARD, np.iinfo(kind).max, kind)
    return np.ascontiguousarray(np.concatenate([ones, bits, ones]))


def edge(buffer: np.ndarray) -> np.ndarray:
    """A copy of the guards of a buffer."""
    return np.concatenate([buffer[:GUARD], buffer[-GUARD:]])


@lru_cache
def build(text: str) -> Callable[..., int]:
    """Compile and load; RuntimeError with the compiler's words."""
    path = FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]
    path.with_suffix(".cpp").write_text(text)
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", f"{path}.so", f"{path}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return ctypes.CDLL(f"{path}.so").run
