"""Tunings, and the policy that picks a precision for a card."""

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest

from netdyno.bench import tuning
from netdyno.bench.tuning import LADDER, TUNINGS, Capability, Tuning, captured, eager, fp32, precision_for, t4, tuned


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), "fp16"),
        ((7, 0), "fp16"),
        ((7, 5), "fp16"),
        ((8, 0), "bf16"),
        ((8, 9), "bf16"),
        ((9, 0), "bf16"),
        ((10, 0), "bf16"),
    ],
)
def test_precision_is_decided_by_capability(capability: Capability, expected: str) -> None:
    assert precision_for(capability) == expected
    assert tuned(capability).precision == expected


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx512f avx512_bf16 amx_tile amx_bf16\n", "bf16"),
        ("model name\t: Xeon\nflags\t\t: fpu avx512f avx512_bf16\n", "fp32"),
        ("model name\t: EPYC\nflags\t\t: fpu avx2 avx512f\n", "fp32"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", "bf16"),
        (None, "fp32"),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_that(
    cpuinfo: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(tuning, "cpu_features", tuning.cpu_features.__wrapped__)
    monkeypatch.setattr(tuning, "Path", lambda name: tmp_path / Path(name).name)
    assert precision_for(None) == tuned(None).precision == expected


@pytest.mark.parametrize("capability", [None, (7, 5), (9, 0)])
def test_tuned_is_everything_and_eager_nothing(capability: Capability) -> None:
    best, first = tuned(capability), eager(capability)
    assert (best.channels_last, best.compile, best.fused_optimizer, best.loader) == (True, True, True, "dali")
    assert (first.channels_last, first.compile, first.fused_optimizer, first.loader) == (False, False, False, "torch")
    assert (best.capture, first.capture) == (capability is not None, False)  # a CPU has no graphs to replay
    assert first.precision == "fp32"
    assert not best.needs_gpu
    assert not first.needs_gpu
    assert (best.memory_limit_mib, first.memory_limit_mib) == (None, None)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_t4_is_what_a_t4_gets_within_its_memory(capability: Capability) -> None:
    """On any card the settings that `tuned` has on sm_75, and 14 GiB."""
    limits = {"name", "needs_gpu", "memory_limit_mib"}
    for field in fields(Tuning):
        if field.name not in limits:
            assert getattr(t4(capability), field.name) == getattr(tuned((7, 5)), field.name), field.name
    assert t4(capability).needs_gpu
    assert t4(capability).memory_limit_mib == 14_336


@pytest.mark.parametrize("capability", [None, (7, 5), (9, 0)])
def test_each_rung_of_the_ladder_is_the_one_below_and_one_thing_more(
    capability: Capability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "cpu_features", lambda: {"amx_bf16"})
    steps = [
        {field.name for field in fields(Tuning) if getattr(below, field.name) != getattr(above, field.name)} - {"name"}
        for below, above in pairwise(TUNINGS[name](capability) for name in LADDER)
    ]
    captured, kernels = ({"capture"}, {"kernels"}) if capability else (set(), set())
    assert steps == [
        {"precision"},
        {"channels_last"},
        {"compile", "fused_optimizer"},
        {"loader"},
        captured,
        kernels,
    ]
    assert (LADDER[0], LADDER[-1]) == ("eager", "tuned")


def test_fp32_is_captured_but_for_its_precision() -> None:
    assert fp32((9, 0)).precision == "fp32"
    assert replace(fp32((9, 0)), name="captured", precision="bf16") == captured((9, 0))


def test_tunings_are_listed_under_their_names() -> None:
    assert list(TUNINGS) == [
        "tuned",
        "captured",
        "dali",
        "compiled",
        "channels-last",
        "amp",
        "eager",
        "fp32",
        "deterministic",
        "t4",
    ]
    for name, make in TUNINGS.items():
        assert make((9, 0)).name == name
