"""`radlads doctor`: what is installed, which backends work, and how to mend what does not."""

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from radlads.cli.options import opt
from radlads.cli.render import Table, counted, size

# package -> what it is for, and the command that installs it
PACKAGES = {
    "numpy": ("base", ""),
    "tokenizers": ("base", ""),
    "pydantic": ("base", ""),
    "torch": ("training and the torch backend", "pip install 'radlads[torch]'"),
    "triton": ("GPU kernels of the torch backend", "comes with PyTorch on Linux with a GPU"),
    "mlx": ("the MLX backend", "pip install 'radlads[mlx]'"),
    "mlx-lm": ("the MLX backend", "pip install 'radlads[mlx]'"),
    "pyarrow": ("training data", "pip install 'radlads[train]'"),
    "matplotlib": ("plots of a run", "pip install 'radlads[train]'"),
    "datasets": ("Hugging Face datasets", "pip install 'radlads[data]'"),
    "transformers": ("loading our folders in transformers", "pip install 'radlads[hf]'"),
    "peft": ("fine-tuning on the torch backend", "pip install 'radlads[finetune]'"),
    "lm-eval": ("tasks of radlads eval", "pip install 'radlads[eval]'"),
    "fastapi": ("radlads serve", "pip install 'radlads[serve]'"),
}
# MLX's wheel for Linux brings the reference BLAS, which multiplies one number at a time.
SLOW_PRODUCTS = 16e9
FASTER_PRODUCTS = "Ten times faster with OpenBLAS (Debian: apt install libopenblas0): LD_PRELOAD=libopenblas.so.0 radlads ..."
GOOD, MISSING, BROKEN, WRONG = "ok", "not installed", "broken", "wrong"


@dataclass(kw_only=True)
class DoctorOptions:
    """How to print what was found."""

    kernels: bool = opt(False, "Also check the kernels of both backends, and time those of MLX.", "--kernels")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class Finding:
    """One thing that was looked at: its state, and what to do where that is not ok."""

    name: str
    state: str
    detail: str
    fix: str = ""


@dataclass
class DoctorResult:
    """All findings; `healthy` when at least one backend works and no kernel is wrong. `speeds` are what MLX was timed at."""

    radlads: str
    python: str
    platform: str
    healthy: bool
    findings: list[Finding]
    speeds: list[dict[str, Any]]

    @property
    def exit_status(self) -> int:
        """3 when no backend works or a kernel is wrong."""
        return 0 if self.healthy else 3

    def blocks(self) -> list[Table | str]:
        """One table, and the verdict."""
        rows = [(f.name, f.state, f.detail, f.fix) for f in self.findings]
        found = Table(("part", "state", "found", "to mend"), rows)
        wrong = any(f.state == WRONG for f in self.findings)
        verdict = "No backend works: install PyTorch or MLX with one of the commands above."
        if self.healthy or wrong:
            verdict = "A kernel is wrong on this machine: please report all of this." if wrong else "Ready."
        head = f"radlads {self.radlads}, Python {self.python}, {self.platform}"
        return [head, found, *([self.times()] if self.speeds else []), verdict]

    def times(self) -> Table:
        """What was timed, ours beside mlx-lm's own forms."""
        rows = []
        for speed in self.speeds:
            bytes_ = speed["unit"] == "bytes/s"
            rate = f"{speed['rate'] / 1e9:,.1f} GB/s" if bytes_ else f"{speed['rate']:,.0f} {speed['unit']}"
            share = "" if speed["of_copy"] is None else f"{100 * speed['of_copy']:.0f} %"
            rows.append((speed["what"], speed["form"], rate, share))
        return Table(("MLX, one layer's recurrence", "form", "speed", "of a copy's bandwidth"), rows)


def doctor(options: DoctorOptions) -> DoctorResult:
    """Look at packages, backends, processor and disk."""
    from radlads import __version__

    backends = [torch_backend(), mlx_backend()]
    tests, speeds = mlx_kernels(options.kernels) if backends[1].state == GOOD else ([], [])
    if options.kernels and backends[0].state == GOOD:
        tests = [*tests, *torch_kernels()]
    findings = [*map(package, PACKAGES), *backends, *tests, machine(), disk()]
    healthy = any(finding.state == GOOD for finding in backends) and all(finding.state == GOOD for finding in tests)
    return DoctorResult(__version__, platform.python_version(), platform.platform(), healthy, findings, speeds)


def package(name: str) -> Finding:
    """Whether a package is installed, and its version."""
    purpose, fix = PACKAGES[name]
    try:
        return Finding(name, GOOD, f"{version(name)} ({purpose})")
    except PackageNotFoundError:
        return Finding(name, MISSING, purpose, fix or "pip install radlads")


def torch_backend() -> Finding:
    """Whether the torch backend loads, and on which device."""
    if find_spec("torch") is None:
        return Finding("backend torch", MISSING, "", PACKAGES["torch"][1])
    try:
        torch = import_module("torch")
        import_module("radlads.backends.torch.engine")
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
        return Finding("backend torch", GOOD, f"{device}, {counted(torch.get_num_threads(), 'thread')}")
    except Exception as error:  # a broken installation fails in its own ways
        return Finding("backend torch", BROKEN, f"{type(error).__name__}: {error}", "pip install --force-reinstall torch")


def torch_kernels() -> list[Finding]:
    """Each recurrence of the torch backend against float64: the GPU's kernels where there is one, else the plain form."""
    fix = "Use the Triton that your PyTorch release brings, and report the card and both versions"
    try:
        torch, selftest = import_module("torch"), import_module("radlads.backends.torch.kernels.selftest")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and find_spec("triton") is not None:
            capability = torch.cuda.get_device_capability()[0]
            refusal = selftest.triton_refusal(import_module("triton").__version__, capability)
            if refusal is not None:
                return [Finding("kernels of torch", WRONG, refusal, "pip install --upgrade torch (2.11 brings Triton 3.6)")]
        checks = selftest.kernel_selftest(device)
    except Exception as error:  # compilers and drivers fail in their own ways
        return [Finding("kernels of torch", BROKEN, f"{type(error).__name__}: {error}", fix)]
    return [
        Finding(
            c.name,
            GOOD if c.passed else WRONG,
            f"worst relative error {c.error:.1e} in {c.where}, at most {c.bar:.0e}",
            "" if c.passed else fix,
        )
        for c in checks
    ]


def mlx_backend() -> Finding:
    """Whether the MLX backend loads, and on which device."""
    if find_spec("mlx") is None or find_spec("mlx_lm") is None:
        return Finding("backend mlx", MISSING, "", PACKAGES["mlx"][1])
    try:
        core = import_module("mlx.core")
        import_module("radlads.backends.mlx.engine")
        if core.default_device() != core.gpu:
            rate = import_module("radlads.backends.mlx.measure").product_rate()
            detail = f"{mlx_device(core)}, matrix products at {rate / 1e9:.1f} GFLOP/s"
            return Finding("backend mlx", GOOD, detail, FASTER_PRODUCTS if rate < SLOW_PRODUCTS else "")
        return Finding("backend mlx", GOOD, mlx_device(core))
    except Exception as error:  # a broken installation fails in its own ways
        return Finding("backend mlx", BROKEN, f"{type(error).__name__}: {error}", "pip install --force-reinstall mlx mlx-lm")


def mlx_device(core: Any) -> str:
    """The device that MLX computes on: the chip, what drives it, and the memory it may use."""
    about = core.device_info()
    if core.default_device() != core.gpu:
        return "CPU, without kernels of our own"
    memory = about.get("memory_size") or about.get("total_memory") or 0
    name, driver = about.get("device_name", "GPU"), "Metal" if core.metal.is_available() else "CUDA"
    return f"{name}, {driver}" + (f", {size(memory)} memory" if memory else "")


def mlx_kernels(asked: bool) -> tuple[list[Finding], list[dict[str, Any]]]:
    """The self-test of the MLX backend, always on a Mac's GPU and elsewhere when asked for: its comparisons and its speeds."""
    metal = import_module("mlx.core").metal.is_available()
    if not asked and not metal:
        return [], []
    selftest = import_module("radlads.backends.mlx.selftest")
    found = []
    for name, check in selftest.checks().items():
        try:
            done = check()
            found.append(kernel_finding(done.name, done.good, f"error {done.error:.1e}, at most {done.bound:.0e}"))
        except Exception as error:  # a kernel that does not compile fails in MLX's own way
            found.append(kernel_finding(name, False, f"{type(error).__name__}: {error}"))
    if not all(finding.state == GOOD for finding in found):
        return found, []
    return found, [asdict(speed) for speed in selftest.speeds()]


def kernel_finding(name: str, good: bool, detail: str) -> Finding:
    """The finding of one kernel comparison."""
    return Finding(f"mlx {name}", GOOD if good else WRONG, detail, "" if good else "Please report all of this")


def machine() -> Finding:
    """Processor cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return Finding("machine", GOOD, f"{platform.machine()}, {os.cpu_count()} cores, {size(memory)} memory")


def disk() -> Finding:
    """Free space where runs are written."""
    free = shutil.disk_usage(".").free
    low = free < 10**9
    return Finding("disk", "low" if low else GOOD, f"{size(free)} free here", "Free some space" if low else "")
