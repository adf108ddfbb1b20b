"""Triton, or a stand-in whose decorators work and whose kernels refuse to launch.

The only guarded import of the package: kernel modules import `triton`, `tl`, `HAS_TRITON` and `HAS_GLUON` from here.
"""
from importlib.util import find_spec
from uuid import uuid4

# Where the operators of the kernels are registered. A shipped model file has its own place each time it is loaded: PyTorch
# lets a name be registered again, and then the operators that others hold under it point to freed memory.
OPERATOR_NAMESPACE = "radlads" if __name__.startswith("radlads.") else f"radlads_{uuid4().hex[:8]}"

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:
    from types import SimpleNamespace

    class RefusedKernel:
        def __init__(self, fn: object) -> None:
            self.fn = fn

        def __getitem__(self, grid: object) -> None:
            raise RuntimeError("this kernel needs triton: pip install triton, or use the plain form")

    def decorate_only(fn: object = None, **_: object) -> object:
        return RefusedKernel(fn) if fn is not None else RefusedKernel

    triton = SimpleNamespace(jit=decorate_only, autotune=decorate_only, heuristics=decorate_only)
    tl = SimpleNamespace(constexpr=lambda value: value)
    HAS_TRITON = False

# The layer below Triton that the Hopper kernels are written in; part of Triton since 3.5. A model file shipped in a folder
# does not carry those kernels: it uses them where radlads is installed, and the portable ones elsewhere.
HAS_GLUON = HAS_TRITON and find_spec("triton.experimental.gluon") is not None and find_spec("radlads") is not None
