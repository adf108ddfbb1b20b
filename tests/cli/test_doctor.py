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

    timed = [selftest.Speed("memory", "copy", 1e9, "bytes/s"), selftest.Speed("decoding", "radlads", 1234.5, "tokens/s", 0.81)]
    monkeypatch.setattr(selftest, "speeds", lambda: iter(timed))
    outcome = radlads("doctor", "--kernels")
    assert "wkv7, heads of 128" in outcome.out and "1.0 GB/s" in outcome.out and "Ready." in outcome.out
    assert "1,234 tokens/s" in outcome.out and "81 %" in outcome.out
    sound = selftest.wkv7
    monkeypatch.setitem(
        selftest.OPS, "wkv7", (lambda *x, scale: [1.0001 * y for y in sound(*x, scale=scale)], selftest.OPS["wkv7"][1])
    )
    outcome = radlads("doctor", "--kernels")
    assert outcome.status == 3 and "wrong" in outcome.out and "A kernel is wrong" in outcome.out


def test_kernel_that_does_not_compile_is_reported_beside_the_others(radlads, monkeypatch):
    from radlads.backends.mlx import selftest

    sound = selftest.golden_check

    def broken(op, head_size):
        if (op, head_size) == ("wkv6", 96):
            raise RuntimeError("no such register")
        return sound(op, head_size)

    monkeypatch.setattr(selftest, "golden_check", broken)
    outcome = radlads("doctor", "--kernels", "--json")
    states = {f["name"]: f for f in json.loads(outcome.out)["findings"] if f["name"].startswith("mlx wkv")}
    assert outcome.status == 3 and "no such register" in states["mlx wkv6, heads of 96"]["detail"]
    assert len(states) == 6 and states["mlx wkv7, heads of 64, with gradients"]["state"] == GOOD


def test_on_a_mac_the_kernels_are_checked_unasked(radlads, monkeypatch):
    import mlx.core as mx

    from radlads.backends.mlx import selftest

    plain = json.loads(radlads("doctor", "--json").out)
    assert not plain["speeds"] and not any(f["name"].startswith("mlx wkv") for f in plain["findings"])
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(selftest, "LANES", {64: 4})
    monkeypatch.setattr(selftest, "speeds", lambda: iter(()))
    names = [f["name"] for f in json.loads(radlads("doctor", "--json").out)["findings"]]
    assert "mlx wkv6, heads of 64, with gradients" in names


def test_device_is_named_as_its_owner_knows_it():
    from types import SimpleNamespace

    about = {"device_name": "Apple M3 Ultra", "memory_size": 96 * 10**9}
    mac = SimpleNamespace(
        gpu="gpu", default_device=lambda: "gpu", device_info=lambda: about, metal=SimpleNamespace(is_available=lambda: True)
    )
    assert module.mlx_device(mac) == "Apple M3 Ultra, Metal, 96 GB memory"
    mac.default_device = lambda: "cpu"
    assert module.mlx_device(mac).startswith("CPU")


@pytest.mark.parametrize("rate, fix", [(4.6e9, True), (80e9, False)])
def test_slow_products_of_a_cpu_are_told_with_their_remedy(monkeypatch, rate, fix):
    import mlx.core as mx

    from radlads.backends.mlx import measure

    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    monkeypatch.setattr(measure, "product_rate", lambda: rate)
    found = module.mlx_backend()
    assert found.state == GOOD and f"{rate / 1e9:.1f} GFLOP/s" in found.detail and ("OpenBLAS" in found.fix) == fix


def test_speeds_name_every_form():
    from radlads.backends.mlx import selftest

    found = list(selftest.speeds())
    assert {(speed.what.split()[0], speed.form) for speed in found} >= {
        ("memory", "copy"), ("prompt", "radlads"), ("prompt", "token loop"), ("decoding", "radlads"), ("decoding", "token loop"),
    }  # fmt: skip
    assert all(speed.rate > 0 for speed in found)


def test_torch_kernels_are_run_and_a_wrong_one_fails(radlads, monkeypatch):
    selftest = module.import_module("radlads.backends.torch.kernels.selftest")
    assert [f.state for f in module.torch_kernels()] == [GOOD] * len(selftest.CASES)
    wrong = selftest.KernelCheck("wkv7", float("nan"), "d(k)", 1e-2)
    monkeypatch.setattr(selftest, "kernel_selftest", lambda device: [wrong])
    outcome = radlads("doctor", "--kernels")
    assert outcome.status == 3 and "kernel is wrong" in outcome.out and "d(k)" in outcome.out
