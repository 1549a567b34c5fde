"""Each check, well and not; NVML, probes and disks by stand-ins, and once everything as it is here."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from netdyno.bench import cli_doctor, doctor, machine, schema
from netdyno.bench.data import prepared, synthetic
from netdyno.bench.doctor import CHECKS, Finding, Place, examine
from netdyno.bench.errors import UserError

VERSIONS = {
    "python": "3.12.1",
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "triton": "3.6.0",
    "numpy": "2.1.0",
    "dali": "2.4.0",
    "driver": None,
}
NEEDS = {
    "netdyno": ["torch>=2.9", "nvidia-dali-cuda120>=2.0", "ruff>=99; extra == 'dev'", "plotly>=99"],
    "torch": ["triton==3.6.0; platform_system == 'Linux'"],
    "torchvision": ["torch (==2.11.0)", "numpy"],
}
CEILINGS = {
    "measured_utc": "2026-11-24T12:00:00Z",
    "torch": "2.11.0",
    "matmul_bf16_tflops": 788.0,
    "copy_gb_per_s": 4300.0,
}


class NVMLError(Exception):
    pass


class Nvml:
    """What the checks ask NVML beyond `Gpu`'s own questions; a question in `silent` is not answered."""

    NVMLError = NVMLError
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    def __init__(self) -> None:
        self.silent: set[str] = set()
        self.answers: dict[str, Any] = {
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetTotalEnergyConsumption": 0,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 1,  # idle, which slows nothing down
            "nvmlDeviceGetComputeRunningProcesses": [],
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(free=100 * 2**30, total=140 * 2**30),
        }

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12_040

    def __getattr__(self, question: str) -> Any:
        def answer(handle: str) -> Any:
            assert handle == "card"
            if question in self.silent:
                raise NVMLError("Not Supported")
            return self.answers[question]

        if question.startswith("nvmlDevice"):
            return answer
        raise AttributeError(question)


class Card:
    name, driver = "NVIDIA H200", "550.1"

    def __init__(self) -> None:
        self._nvml, self._handle = Nvml(), "card"
        self.values = {"sm_clock_mhz": 345.0, "power_w": 75.4, "temperature_c": 34.0, "utilisation_pct": 0.0}

    def reading(self) -> dict[str, float]:
        return self.values


def pretend(monkeypatch: pytest.MonkeyPatch, card: Card | None) -> None:
    @contextmanager
    def opened() -> Iterator[Card | None]:
        yield card

    monkeypatch.setattr(doctor.Gpu, "open", opened)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    pretend(monkeypatch, made)
    return made


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(doctor, "requires", NEEDS.__getitem__)
    here = {"slug": "some-machine", "gpu": None, "cpu": "some", "cores": 2, "memory_gib": 4, "versions": VERSIONS}
    return Place(machine=here, results=tmp_path / "results", data=tmp_path / "data")


def on_gpu(place: Place) -> Place:
    return Place(machine=place.machine | {"gpu": "NVIDIA H200"}, results=place.results, data=place.data)


def with_versions(place: Place, **versions: str | None) -> Place:
    changed = place.machine | {"versions": VERSIONS | versions}
    return Place(machine=changed, results=place.results, data=place.data)


def probe(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(doctor, "PROBES", (sys.executable, "-c", script))


def check(function: doctor.Check, place: Place) -> tuple[str, str, str]:
    """State, found and advice; whatever is not well says what to do."""
    finding = examine(function, place)
    assert finding.name == function.__name__
    assert "\n" not in finding.found + finding.advice
    assert (finding.state == "ok") == (finding.advice == "")
    return finding.state, finding.found, finding.advice


# how findings come about, and how they look


def test_an_exception_inside_a_check_is_a_failure(place: Place) -> None:
    def broken(place: Place) -> Finding:
        raise ZeroDivisionError("one line\nand another")

    def user_error(place: Place) -> Finding:
        raise UserError("x is missing; fetch it")

    def silent(place: Place) -> Finding:
        raise ValueError

    def not_installed(place: Place) -> Finding:
        import netdyno_there_is_no_such_module  # noqa: F401

        raise AssertionError

    assert check(broken, place) == ("fail", "one line", "the check itself broke by ZeroDivisionError: report it")
    assert examine(user_error, place) == Finding(name="user_error", state="fail", found="x is missing; fetch it")
    assert check(silent, place)[:2] == ("fail", "ValueError")
    assert check(not_installed, place)[2] == "install what is missing: make setup, or pip install netdyno"


FINDING = Finding(name="gpu", state="warn", found="no [bold]GPU " + "word " * 30, advice="install [one]")


def shown(terminal: bool, capsys: pytest.CaptureFixture[str]) -> list[str]:
    console = Console(width=80, force_terminal=terminal, color_system=None, markup=False, highlight=False)
    cli_doctor.show(FINDING, console)
    return capsys.readouterr().out.splitlines()


def test_a_finding_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(False, capsys) == [f"warn  gpu        {FINDING.found} → install [one]"]


def test_a_finding_hangs_under_itself_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    first, *more = shown(True, capsys)
    assert first.startswith("warn  gpu        no [bold]GPU word word")
    assert len(more) >= 2
    assert all(line.startswith(" " * 17) and len(line) <= 80 for line in more)
    assert more[-1].strip() == "→ install [one]"


@pytest.mark.parametrize(("states", "code"), [(["ok", "warn"], 0), (["ok", "fail", "ok"], 1), (["fail", "warn"], 1)])
def test_the_exit_code_says_whether_anything_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], states: list[Any], code: int, tmp_path: Path
) -> None:
    from netdyno.bench import cli

    def finding(state: Any) -> doctor.Check:
        return lambda place: Finding(name="some", state=state, found=str(place.results), advice="mend it")

    monkeypatch.setattr(doctor, "CHECKS", tuple(map(finding, states)))
    monkeypatch.setattr(machine, "describe", lambda: {"slug": "some-machine"})
    monkeypatch.setattr(sys, "argv", ["netdyno", "doctor", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{state:4}  some       {tmp_path} → mend it" for state in states]


# software and devices


def test_versions(place: Place) -> None:
    found = "python 3.12.1, torch 2.11.0, torchvision 0.26.0, triton 3.6.0, numpy 2.1.0, dali 2.4.0"
    assert check(doctor.versions, place) == ("ok", found, "")
    assert check(doctor.versions, with_versions(place, torch="2.11.0+cu130"))[0] == "ok"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"triton": "3.5.0"}, "torch needs triton==3.6.0, here is 3.5.0"),
        ({"triton": None}, "torch needs triton==3.6.0, here is none"),
        ({"torch": "2.10.0"}, "torchvision needs torch==2.11.0, here is 2.10.0"),
        ({"torch": "2.8.0"}, "netdyno needs torch>=2.9, here is 2.8.0"),
        ({"dali": "1.9.0"}, "netdyno needs nvidia-dali-cuda120>=2.0, here is 1.9.0"),
        ({"dali": None}, "netdyno needs nvidia-dali-cuda120>=2.0, here is none"),
    ],
)
def test_versions_that_do_not_work_together(place: Place, changed: dict[str, Any], says: str) -> None:
    state, found, _ = check(doctor.versions, with_versions(place, **changed))
    assert state == "fail"
    assert says in found


def test_versions_of_this_machine(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert check(doctor.versions, Place(machine=machine.describe(), results=place.results, data=place.data))[0] == "ok"


def test_gpu(place: Place, card: Card) -> None:
    assert check(doctor.gpu, place) == ("ok", "NVIDIA H200, sm_90, driver 550.1", "")


@pytest.mark.usefixtures("no_card")
def test_without_a_gpu(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise NVMLError("Driver/library version mismatch")

    fake = SimpleNamespace(nvmlInit=init, nvmlShutdown=lambda: None, NVMLError=NVMLError)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    state, found, advice = check(doctor.gpu, place)
    assert (state, found) == ("warn", "no GPU: Driver/library version mismatch")
    assert "runs happen on the CPU" in advice
    fake.nvmlInit = lambda: None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert check(doctor.gpu, place)[:2] == ("warn", "no GPU that CUDA_VISIBLE_DEVICES=7 leaves visible")


@pytest.mark.parametrize(
    ("built", "usable", "state"), [("12.4", True, "ok"), ("13.0", False, "fail"), (None, False, "fail")]
)
def test_cuda(
    place: Place, card: Card, monkeypatch: pytest.MonkeyPatch, built: str | None, usable: bool, state: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    got, found, advice = check(doctor.cuda, place)
    assert got == state
    assert (f"built for CUDA {built}" if built else "built without CUDA") in found
    assert "the driver takes CUDA 12.4" in found
    assert ("update the driver" in advice) == (state == "fail")


@pytest.mark.usefixtures("no_card")
def test_cuda_without_a_gpu(place: Place) -> None:
    state, found, _ = check(doctor.cuda, place)
    assert state == "ok"
    assert "no GPU to use it on" in found


def test_compiler(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(doctor.sysconfig, "get_config_var", {"INCLUDEPY": str(tmp_path)}.__getitem__)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    there = {"g++"}
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    assert check(doctor.compiler, place) == ("ok", f"/bin/g++, {tmp_path}/Python.h", "")
    state, found, advice = check(doctor.compiler, on_gpu(place))
    assert (state, found) == ("fail", "no C compiler (gcc or clang)")
    assert "apt install g++ python3-dev" in advice
    there.add("clang")
    assert check(doctor.compiler, on_gpu(place))[:2] == ("ok", f"/bin/clang, {tmp_path}/Python.h")
    monkeypatch.setenv("CC", "icx")
    monkeypatch.setenv("CXX", "icpx")
    assert check(doctor.compiler, on_gpu(place))[:2] == ("fail", "no C compiler (icx)")
    assert check(doctor.compiler, place)[:2] == ("fail", "no C++ compiler (icpx)")
    (tmp_path / "Python.h").unlink()
    assert f"no {tmp_path}/Python.h" in check(doctor.compiler, place)[1]


# what is tried out


@pytest.mark.parametrize("function", [doctor.compiling, doctor.dali, doctor.graphs])
def test_a_probe_says_what_it_found(place: Place, monkeypatch: pytest.MonkeyPatch, function: doctor.Check) -> None:
    probe(monkeypatch, "import sys; print('a library talks'); print(f'{sys.argv[1]} is well')")
    assert check(function, on_gpu(place)) == ("ok", f"{function.__name__} is well", "")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import sys; print('no'); sys.exit('RuntimeError: it is broken')", "RuntimeError: it is broken"),
        ("import os; os.kill(os.getpid(), 11)", "the process that tried it was ended by SIGSEGV"),
        ("raise SystemExit(3)", "the process that tried it said nothing (exit code 3)"),
        ("pass", "the process that tried it said nothing (exit code 0)"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
@pytest.mark.parametrize("function", [doctor.compiling, doctor.dali, doctor.graphs, doctor.ceilings])
@pytest.mark.usefixtures("no_card")
def test_a_probe_that_fails(
    place: Place, monkeypatch: pytest.MonkeyPatch, function: doctor.Check, script: str, says: str
) -> None:
    monkeypatch.setattr(doctor, "PROBE_S", 1.0 if "sleep" in script else 60.0)
    probe(monkeypatch, script)
    state, found, _ = check(function, on_gpu(place))
    assert (state, found) == ("fail", says)
    assert not place.results.exists()


def test_a_probe_starts_with_an_empty_compiler_cache_and_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # the user's, in which it may all be compiled already
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    probe(
        monkeypatch,
        f"import os; paths = [os.environ[name] for name in {names}];"
        "assert all(os.listdir(path) == [] for path in paths); open(paths[0] + '/x', 'w'); print(paths[0])",
    )
    state, found, _ = check(doctor.compiling, place)
    assert state == "ok"
    assert not Path(found).exists()


def test_no_graph_without_a_gpu(place: Place) -> None:
    assert check(doctor.graphs, place) == ("ok", "no GPU whose work could be captured", "")


# state of the machine


def test_nvml(place: Place, card: Card) -> None:
    assert check(doctor.nvml, place) == ("ok", "345 MHz, 75 W, 34 °C, energy counter", "")
    card._nvml.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 4 | 32 | 128
    state, found, advice = check(doctor.nvml, place)
    assert state == "warn"
    assert found.endswith("slowed down now: SwThermalSlowdown, HwPowerBrakeSlowdown")
    assert "cool the card" in advice


def test_nvml_that_does_not_tell_all(place: Place, card: Card) -> None:
    del card.values["power_w"]
    card._nvml.silent = {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetCurrentClocksThrottleReasons"}
    state, found, _ = check(doctor.nvml, place)
    assert (state, found) == ("warn", "345 MHz, 34 °C, not told: power_w, energy, throttle reasons")


def test_processes(place: Place, card: Card) -> None:
    assert check(doctor.processes, place) == ("ok", "none on the GPU", "")
    card._nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = [SimpleNamespace(pid=1), SimpleNamespace(pid=2)]
    state, found, advice = check(doctor.processes, place)
    assert (state, found) == ("warn", "2 on the GPU")
    assert "end them" in advice
    card._nvml.silent = {"nvmlDeviceGetComputeRunningProcesses"}
    assert check(doctor.processes, place)[0] == "ok"


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("function", [doctor.nvml, doctor.processes])
def test_nothing_to_read_without_a_gpu(place: Place, function: doctor.Check) -> None:
    state, found, _ = check(function, place)
    assert state == "ok"
    assert "no GPU" in found


def test_memory(place: Place, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    host = SimpleNamespace(available=6 * 2**30, total=8 * 2**30)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: host)
    found = "100.0 of 140.0 GiB free on the GPU, 6.0 of 8.0 GiB free on the host"
    assert check(doctor.memory, place) == ("ok", found, "")
    host.available = 3 * 2**30
    state, _, advice = check(doctor.memory, place)
    assert (state, advice.split("as much on ")[1]) == ("warn", "the host (4 GiB)")
    card._nvml.answers["nvmlDeviceGetMemoryInfo"].free = 2**30
    assert check(doctor.memory, place)[2].endswith("on the GPU (5 GiB) and the host (4 GiB)")


def make_set(name: str, folder: Path, **changes: Any) -> None:
    """A manifest alone, which is all that is looked at."""
    form = prepared.FORMS[name]
    facts = {"images": 1, "shape": [*(form.shape or ())], "classes": form.classes, "sha256": "", "labels_sha256": ""}
    splits = dict.fromkeys(("train", "test") if form.classes else ("train",), facts)
    named = {"classes": [*map(str, range(form.classes))]}
    folder.mkdir(parents=True)
    manifest = {"name": name, "kind": form.kind, "split": "own", "splits": splits} | named | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_data(place: Place) -> None:
    assert check(doctor.data, place)[0] == "warn"
    for name in prepared.FORMS:
        make_set(name, place.data / name)
    found = "mnist real, cifar10 real, cifar100 real, anime_faces real, flowers real"
    assert check(doctor.data, place) == ("ok", found, "")


def test_data_that_is_missing_drawn_or_damaged(place: Place) -> None:
    make_set("mnist", place.data / "mnist")
    make_set("cifar10", place.data / "synthetic" / "cifar10", synthetic=True)
    state, found, advice = check(doctor.data, place)
    assert state == "warn"
    assert found == "mnist real, cifar10 synthetic, cifar100 missing, anime_faces missing, flowers missing"
    assert "netdyno data fetch" in advice
    (place.data / "flowers").mkdir()
    state, found, advice = check(doctor.data, place)
    assert state == "fail"
    assert found.endswith("flowers damaged")
    assert advice.startswith(f"{place.data / 'flowers'} has no manifest.json")


def test_a_drawn_set_is_synthetic(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SIZES", {"mnist": (40, 10)})
    synthetic.make("mnist", place.data)
    assert "mnist synthetic" in check(doctor.data, place)[1]


def test_disk(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "yet"))
    free = 10.0
    asked = set()

    def usage(folder: Path) -> SimpleNamespace:
        asked.add(folder)
        return SimpleNamespace(free=free * 2**30)

    closed: set[Path] = set()
    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: folder not in closed)
    found = "10.0 GiB free for data, 10.0 GiB free for results, 10.0 GiB free for cache"
    assert check(doctor.disk, place) == ("ok", found, "")
    assert asked == {tmp_path}  # the nearest folder that is there
    free = 1.5
    state, _, advice = check(doctor.disk, place)
    assert state == "warn"
    assert str(place.data) in advice
    place.data.mkdir()
    closed.add(place.data)
    assert check(doctor.disk, place)[0] == "warn"  # whole sets may lie where nobody writes
    place.results.mkdir()
    closed.add(place.results)
    state, found, advice = check(doctor.disk, place)
    assert state == "fail"
    assert found.startswith(f"{place.results} cannot be written; ")
    assert "--results" in advice


# ceilings


def test_ceilings_are_kept(place: Place, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(monkeypatch, f"import json; print(json.dumps({CEILINGS}))")
    path = place.results / "some-machine" / "machine.json"
    found = f"bf16 matrix products 788.00 TFLOP/s, copies 4,300.0 GB/s; kept in {path}"
    assert check(doctor.ceilings, place) == ("ok", found, "")
    assert json.loads(path.read_text())["ceilings"] == CEILINGS | {"other_processes": 0}
    card._nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = [SimpleNamespace(pid=1)]
    state, _, advice = check(doctor.ceilings, place)
    assert state == "warn"
    assert "again" in advice
    kept = json.loads(path.read_text())
    assert kept["ceilings"]["other_processes"] == 1
    assert list(schema.machine_problems(kept)) == []


@pytest.mark.usefixtures("no_card")
def test_ceilings_that_cannot_be_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(monkeypatch, f"import json; print(json.dumps({CEILINGS}))")
    place.results.write_text("a file")
    finding = examine(doctor.ceilings, place)
    assert (finding.name, finding.state) == ("ceilings", "fail")
    assert "cannot be written" in finding.found


# everything as it is


@pytest.mark.slow
def test_the_command_on_this_machine(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "NETDYNO_DATA": str(tmp_path / "data")}
    done = subprocess.run(
        [sys.executable, "-m", "netdyno.bench", "doctor", "--results", str(tmp_path / "results")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert [words[1] for words in lines] == [function.__name__ for function in CHECKS]
    assert {words[0] for words in lines} <= {"ok", "warn"}
    (path,) = (tmp_path / "results").glob("*/machine.json")
    described = json.loads(path.read_text())
    assert list(schema.machine_problems(described)) == []
    assert described["ceilings"]["copy_gb_per_s"] > 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("function", [doctor.gpu, doctor.cuda, doctor.dali, doctor.graphs, doctor.nvml])
def test_a_gpu_as_it_is(tmp_path: Path, function: doctor.Check) -> None:
    here = Place(machine=machine.describe(), results=tmp_path, data=tmp_path)
    assert examine(function, here).state in ("ok", "warn")
