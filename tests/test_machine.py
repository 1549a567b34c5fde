import re
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from netdyno.bench import machine
from netdyno.bench.machine import _slug, describe


def pretend(monkeypatch: pytest.MonkeyPatch, gpu: object, cpu: str) -> None:
    @contextmanager
    def opened():  # type: ignore[no-untyped-def]
        yield gpu

    monkeypatch.setattr(machine.Gpu, "open", opened)
    monkeypatch.setattr(machine, "_cpu_name", lambda: cpu)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1, 5})


def test_this_machine() -> None:
    here = describe()
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", here["slug"])
    assert here["slug"].endswith(f"-{here['cores']}c")
    assert here["cores"] >= 1
    assert here["memory_gib"] >= 1
    assert here["cpu"]
    versions = here["versions"]
    assert set(versions) == {"python", "torch", "torchvision", "triton", "numpy", "dali", "driver"}
    for name in ("python", "torch", "torchvision", "numpy", "dali"):
        assert re.match(r"\d+\.\d+", versions[name]), name
    assert (here["gpu"] is None) == (versions["driver"] is None)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None, "AMD EPYC 9654 96-Core Processor")
    here = describe()
    assert here["slug"] == "cpu-amd-epyc-9654-96-core-3c"
    assert (here["gpu"], here["versions"]["driver"], here["cores"]) == (None, None, 3)


def test_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, SimpleNamespace(name="NVIDIA H200", driver="580.1"), "Intel(R) Xeon(R) CPU @ 2.20GHz")
    here = describe()
    assert here["slug"] == "nvidia-h200-intel-xeon-2-20ghz-3c"
    assert (here["gpu"], here["versions"]["driver"]) == ("NVIDIA H200", "580.1")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", {"torch": "netdyno-there-is-no-such-package"})
    monkeypatch.setattr(machine, "DALI_PACKAGES", ("netdyno-nor-this", "pytest"))
    versions = describe()["versions"]
    assert versions["torch"] is None
    assert versions["dali"] == pytest.__version__


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Tesla T4", "tesla-t4"),
        ("NVIDIA H200 MIG 1g.18gb", "nvidia-h200-mig-1g-18gb"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "intel-core-i7-8700k-3-70ghz"),
        ("AMD Ryzen 7 PRO 4750U with Radeon Graphics", "amd-ryzen-7-pro-4750u-radeon-graphics"),
        ("cpu", "cpu"),
        ("../../etc", "etc"),
        ("処理装置", "unknown"),
        ("", "unknown"),
    ],
)
def test_slugs(name: str, slug: str) -> None:
    assert _slug(name) == slug
