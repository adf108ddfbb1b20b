import json

import pytest

from radlads.cli import doctor as module
from radlads.cli.doctor import GOOD, MISSING


def test_report_names_packages_and_backends(radlads):
    found = json.loads(radlads("doctor", "--json").out)
    names = {finding["name"]: finding for finding in found["findings"]}
    assert names["numpy"]["state"] == GOOD and {"torch", "mlx", "backend torch", "backend mlx", "disk", "machine"} <= set(names)
    assert found["healthy"] == any(names[f"backend {name}"]["state"] == GOOD for name in ("torch", "mlx"))
    assert "numpy" in radlads("doctor").out


def test_without_a_backend_it_fails_and_says_what_to_install(radlads, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    outcome = radlads("doctor")
    assert outcome.status == 3 and "radlads[torch]" in outcome.out and "radlads[mlx]" in outcome.out


@pytest.mark.parametrize("look", [module.torch_backend, module.mlx_backend])
def test_broken_backend_is_reported_not_raised(monkeypatch, look):
    def broken(name):
        raise OSError("wrong library")

    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr(module, "import_module", broken)
    assert look().state == "broken" and "wrong library" in look().detail and look().fix


def test_missing_package_has_its_command(monkeypatch):
    monkeypatch.setitem(module.PACKAGES, "no-such-package", ("nothing", ""))
    assert module.package("no-such-package").state == MISSING and module.package("no-such-package").fix


def test_kernels_are_compared_with_the_golden_files(radlads, monkeypatch):
    from radlads.backends.mlx import selftest

    monkeypatch.setattr(selftest, "speeds", lambda: iter(["copy 1 GB/s"]))
    outcome = radlads("doctor", "--kernels")
    assert "wkv7, heads of 128" in outcome.out and "copy 1 GB/s" in outcome.out and "Ready." in outcome.out
    sound = selftest.wkv7
    monkeypatch.setitem(
        selftest.OPS, "wkv7", (lambda *x, scale: [1.0001 * y for y in sound(*x, scale=scale)], selftest.OPS["wkv7"][1])
    )
    outcome = radlads("doctor", "--kernels")
    assert outcome.status == 3 and "wrong" in outcome.out and "A kernel is wrong" in outcome.out


def test_kernel_that_does_not_compile_is_reported(radlads, monkeypatch):
    from radlads.backends.mlx import selftest

    def broken():
        raise RuntimeError("no such register")

    monkeypatch.setattr(selftest, "check_goldens", broken)
    outcome = radlads("doctor", "--kernels", "--json")
    assert outcome.status == 3 and "no such register" in outcome.out


def test_torch_kernels_are_run_and_a_wrong_one_fails(radlads, monkeypatch):
    selftest = module.import_module("radlads.backends.torch.kernels.selftest")
    assert [f.state for f in module.torch_kernels()] == [GOOD] * len(selftest.CASES)
    wrong = selftest.KernelCheck("wkv7", float("nan"), "d(k)", 1e-2)
    monkeypatch.setattr(selftest, "kernel_selftest", lambda device: [wrong])
    outcome = radlads("doctor", "--kernels")
    assert outcome.status == 3 and "kernel is wrong" in outcome.out and "d(k)" in outcome.out
