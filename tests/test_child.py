"""What a child measures and says, on small stand-ins of the data."""

import gc
import gzip
import json
import math
import re
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from made_up_records import seen
from PIL import Image

from netdyno.bench import child, machine, runner, step, train
from netdyno.bench import record as records
from netdyno.bench.capture import Captured
from netdyno.bench.data import dali, synthetic
from netdyno.bench.data.loader import Batch
from netdyno.bench.order import Order
from netdyno.bench.train import Evaluation
from netdyno.bench.tuning import TUNINGS, fp32, tuned
from netdyno.bench.workloads import Case, Workload, conv_autoencoder, dcgan, describe, mnist_cnn, quick, resolve

CPU = torch.device("cpu")
EAGER = Case(workload="mnist-cnn", suite="quick", tuning="eager")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("mnist", "cifar10"):
        synthetic.make(name, root, sizes=(300, 100))
    return root


def without_workers(make: Any) -> Any:
    return lambda *images, workers, **options: make(*images, workers=0, **options)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without worker processes, and with one step of warm-up."""
    for name in ("array_loader", "jpeg_loader"):
        monkeypatch.setattr(child.baseline, name, without_workers(getattr(child.baseline, name)))
    monkeypatch.setattr(child, "warm_up", lambda step: bool(torch.isfinite(step()).all()))


@pytest.fixture
def measure(data: Path, tmp_path: Path) -> Any:
    """Runs a case in this process; returns the sections of its record and all events."""

    def measure(case: Case, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        events: list[dict[str, Any]] = []
        order = Order(case=case, data=data, pictures=tmp_path, started=time.time(), **options)
        child.run(order, lambda **event: events.append(json.loads(json.dumps(event, allow_nan=False))))
        return sections(events), events

    return measure


@pytest.fixture
def speak(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a child's `main` in this process; returns the sections, its last event and its standard error."""

    def speak(case: Case = EAGER, data: Path = data) -> tuple[dict[str, Any], dict[str, Any], str]:
        order = Order(case=case, data=data, pictures=tmp_path, started=time.time())
        with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            child.main(order)
        events = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
        return sections(events), events[-1], (tmp_path / "err").read_text()

    return speak


def sections(events: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for event in events:
        if "section" in event:
            found[event["section"]] = found.get(event["section"], {}) | event["value"]
    return found


def documented() -> dict[str, set[str]]:
    """The keys of each section by the docstring of bench/record.py."""
    text = re.sub(r"\([^)]*\)", "", (records.__doc__ or "")).replace("\n                ", " ")
    rows = dict(re.findall(r"^    (\w+) {2,}(.+)$", text, re.MULTILINE))
    return {name: {key.strip() for key in keys.split(",")} for name, keys in rows.items() if name != "status"}


def test_a_whole_record_has_every_key_of_its_description(data: Path, tmp_path: Path) -> None:
    here = machine.describe()
    record = runner.run(EAGER, data=data, results=tmp_path, machine=here, listen=lambda event: None)
    assert (record["status"], record["reason"]) == ("ok", None)
    keys = documented()
    sections = {*records.SECTIONS, "case", "machine"}
    assert set(keys) == sections
    for name in ("case", "timing", "throughput", "memory", "data", "machine", "roofline"):
        assert set(record[name]) == keys[name], name
    assert set(record["accuracy"]) == keys["accuracy"] - {"pictures"}  # a classifier makes none
    assert record["compile"] is record["communication"] is None
    assert record["roofline"]["flop_per_s"] == pytest.approx(32.7e6 * record["throughput"]["images_per_s"], rel=0.01)
    assert record["roofline"]["ceiling_flop_per_s"] is record["roofline"]["share"] is None  # nobody measured them
    assert set(record) == {*keys, "schema", "id", "created_utc", "status", "reason", "code"}
    assert keys["gpu"] == {
        *seen(1.0),
        "failed_readings",
        *("cards", "card", "beside", "fingerprints"),
    }  # which tests/test_gpu.py compares with what the sampler says

    timing, throughput = record["timing"], record["throughput"]
    assert timing["steps"] == 4  # two epochs of 300 images at batch 128
    assert len(timing["block_s"]) == 4
    assert sum(timing["block_s"]) - 1e-5 < timing["train_s"]  # which the loader's end of each epoch is in
    assert timing["wall_s"] == pytest.approx(timing["train_s"], abs=1e-3)  # of one clock, on a CPU
    assert throughput["images_per_s"] == pytest.approx(512 / timing["train_s"], rel=1e-3)
    assert record["memory"]["host_rss_peak_mib"] > 100
    assert record["data"]["images"] == {"train": 300, "test": 100}
    assert (record["data"]["label"], record["data"]["synthetic"]) == ("synthetic", True)
    assert (record["data"]["name"], record["data"]["loader"]) == ("mnist", "torch")
    assert record["data"]["resident"] is False
    assert len(record["data"]["sha256"]["train"]) == 64

    accuracy = record["accuracy"]
    assert [row["epoch"] for row in accuracy["curve"]] == [1, 2]
    assert all(set(row) == {"epoch", "train_s", "eval_s", "train_loss", "metric"} for row in accuracy["curve"])
    assert sum(row["train_s"] for row in accuracy["curve"]) == pytest.approx(timing["train_s"], abs=1e-3)
    assert accuracy["final"] == accuracy["curve"][-1]["metric"]
    assert accuracy["best"] == max(row["metric"] for row in accuracy["curve"])
    assert accuracy["target"] is accuracy["reached"] is accuracy["train_s_to_target"] is None  # a quick run has none


def test_the_seed_decides_the_course(measure: Any) -> None:
    def losses(seed: int) -> list[float]:
        return [row["train_loss"] for row in measure(replace(EAGER, seed=seed))[0]["accuracy"]["curve"]]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_nothing_is_kept_from_warm_up(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def long_warm_up(step: Any) -> bool:
        return all(math.isfinite(step().item()) for _ in range(5))

    before = measure(EAGER)[0]["accuracy"]["curve"]
    monkeypatch.setattr(child, "warm_up", long_warm_up)
    after = measure(EAGER)[0]["accuracy"]["curve"]
    assert [row["train_loss"] for row in after] == [row["train_loss"] for row in before]
    assert [row["metric"] for row in after] == [row["metric"] for row in before]


@pytest.mark.parametrize("mode", ["e2e", "compute", "loader"])
def test_no_epoch_collects_what_was_made_before(measure: Any, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """A full collection takes as long as some epochs do. What is garbage goes before."""
    looked_through: list[int] = []
    kept: list[bool] = []
    start = child.BlockClock.start

    def count(clock: child.BlockClock) -> None:
        looked_through.append(len(gc.get_objects()))  # without those that are left out
        kept.append(garbage() is not None)
        start(clock)

    monkeypatch.setattr(child.BlockClock, "start", count)
    gc.disable()
    cycle = type("Cycle", (), {})()
    cycle.itself, garbage = cycle, weakref.ref(cycle)
    del cycle
    try:
        measure(replace(EAGER, mode=mode))
    finally:
        gc.enable()
    gc.unfreeze()
    assert max(looked_through[-2:]) < len(gc.get_objects()) / 50
    assert kept[-2:] == [False, False]


@pytest.mark.parametrize(("workload", "cores", "workers"), [(mnist_cnn, 32, 16), (dcgan, 32, 8), (dcgan, 4, 4)])
def test_workers_of_the_baseline(monkeypatch: pytest.MonkeyPatch, workload: Any, cores: int, workers: int) -> None:
    monkeypatch.setattr(child.parallel, "cores", lambda: cores)
    for name in ("array_loader", "jpeg_loader"):
        monkeypatch.setattr(child.baseline, name, lambda *images, workers, **options: workers)
    images: Any = SimpleNamespace(images=None, files=(), labels=None)
    assert child.make_loader(workload(), images, TUNINGS["eager"](None), CPU, train=True, seed=0) == workers


@pytest.mark.parametrize("mode", ["compute", "loader"])
def test_modes_without_evaluation(measure: Any, mode: Any) -> None:
    found, events = measure(replace(EAGER, mode=mode))
    assert set(found["throughput"]) == {"images_per_s"}
    assert "accuracy" not in found
    assert found["timing"]["steps"] == 4
    assert len(found["timing"]["block_s"]) == 4
    assert "measure" in [event.get("stage") for event in events]
    assert found["memory"]["host_rss_peak_mib"] > 0


def test_compute_starts_anew_in_each_epoch(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that has learned its only batch takes less power."""
    losses: list[float] = []
    make_step = child.make_step

    def spied(*arguments: Any) -> Any:
        step, players = make_step(*arguments)

        def heard(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            loss = step(images, labels)
            losses.append(loss.item())
            return loss

        return heard, players

    monkeypatch.setattr(child, "make_step", spied)
    measure(replace(EAGER, workload="conv-autoencoder", mode="compute"))  # without dropout, so that losses tell
    first, second = losses[-4:-2], losses[-2:]
    assert first == second
    assert first[0] > first[1]


def test_compute_trains_on_one_resident_batch(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    make_step = child.make_step

    def spied(*arguments: Any) -> Any:
        step, players = make_step(*arguments)
        return lambda images, labels: (seen.append(images), step(images, labels))[1], players

    monkeypatch.setattr(child, "make_step", spied)
    measure(replace(EAGER, mode="compute"))
    timed = seen[-4:]
    assert all(images is timed[0] for images in timed)
    seen.clear()
    measure(EAGER)
    assert not any(images is seen[-4] for images in seen[-3:])


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_a_case_that_compiles_tells_its_compile_times(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(function: Any, **options: Any) -> Any:
        return lambda *inputs: (time.sleep(next(durations, 0)), function(*inputs))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    durations = iter([0.5, 0.5])  # of step and evaluation, at their first calls
    tuned = replace(EAGER, tuning="tuned")
    cold, _ = measure(tuned, compile_only=True)
    assert set(cold) == {"case", "data", "compile", "memory"}
    assert cold["memory"] == {"limit_mib": None}  # it measures nothing else
    warm, _ = measure(tuned)
    assert cold["compile"] | warm["compile"] == {name: pytest.approx(0, abs=60) for name in documented()["compile"]}
    assert 0.5 < cold["compile"]["cold_s"] < cold["compile"]["cold_start_s"]
    assert warm["compile"]["recompiles"] == 0
    assert (warm["data"]["loader"], warm["data"]["resident"]) == ("dali", True)
    assert warm["accuracy"]["final"] >= 0


def test_a_graph_that_is_compiled_again_fails_the_run(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch)
    counts = iter([3, 5])
    monkeypatch.setattr(child, "new_graphs", lambda: next(counts))
    found, events = measure(replace(EAGER, tuning="tuned"))
    [told] = [event for event in events if "status" in event]
    assert told == {"status": "failed", "reason": "2 graphs were compiled or captured inside the timed region"}
    assert found["compile"]["recompiles"] == 2
    assert found["throughput"]["images_per_s"] > 0


def test_pictures_and_further_metrics_of_a_reconstruction(measure: Any, tmp_path: Path) -> None:
    found, _ = measure(Case(workload="conv-autoencoder", suite="quick", tuning="eager"))
    assert sorted(path.name for path in tmp_path.glob("*.webp")) == ["1.webp", "2.webp"]
    with Image.open(tmp_path / "2.webp") as picture:
        assert picture.height < picture.width  # a row of originals above a row of reconstructions
    assert found["accuracy"]["metric"] == "PSNR"
    assert all(-1 <= row["metrics"]["ssim"] <= 1 for row in found["accuracy"]["curve"])


def test_a_trace_is_written(measure: Any, tmp_path: Path) -> None:
    found, _ = measure(EAGER, trace=tmp_path / "trace.json.gz")
    with gzip.open(tmp_path / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    assert found["timing"]["steps"] == 4  # the traced steps are none of the measured ones


def with_recipe(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    def changed(case: Case) -> Workload:
        workload = resolve(case)
        return replace(workload, recipe=replace(workload.recipe, **changes))

    monkeypatch.setattr(child, "resolve", changed)


# several steps at a time, as captured graphs take them


def replaying(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On the CPU, with the function itself for a graph; returns the batches of each call of the training step."""
    calls: list[int] = []

    class Captured:
        graphs = 0
        reserved_before = 0
        own_bytes: ClassVar[dict[str, int]] = {}

        def __init__(self, function: Any, purpose: str) -> None:
            self.function, self.purpose = function, purpose

        def __call__(self, *inputs: torch.Tensor) -> Any:
            if self.purpose == "train":
                calls.append(len(inputs[0]) // 32)
            return self.function(*inputs)

    for module in (child, step, train):
        monkeypatch.setattr(module, "Captured", Captured)
    monkeypatch.setitem(TUNINGS, "tuned", lambda capability: replace(tuned(capability), compile=False, capture=True))
    return calls


def test_several_steps_at_a_time_learn_the_same(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_recipe(monkeypatch, batch_size=32)
    monkeypatch.setattr(dali, "STEPS_AT_ONCE", 4)
    monkeypatch.setattr(dali, "PARTS_OF_EPOCH", 1)
    case = replace(EAGER, tuning="tuned")
    with monkeypatch.context() as apart:
        apart.setitem(TUNINGS, "tuned", lambda capability: replace(tuned(capability), compile=False))
        expected, _ = measure(case)
    calls = replaying(monkeypatch)
    found, _ = measure(case)
    assert calls[-6:] == [3, 3, 3] * 2  # nine batches of 32 in 300 images
    assert found["accuracy"]["curve"] == [
        row | {"train_s": pytest.approx(0, abs=60), "eval_s": pytest.approx(0, abs=60)}
        for row in expected["accuracy"]["curve"]
    ]
    assert found["timing"]["steps"] == expected["timing"]["steps"] == 18
    assert (found["timing"]["block_steps"], len(found["timing"]["block_s"])) == (3, 6)


def test_the_fewer_steps_of_an_epochs_end_are_captured_too(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_recipe(monkeypatch, batch_size=32)
    monkeypatch.setattr(dali, "STEPS_AT_ONCE", 5)
    monkeypatch.setattr(dali, "PARTS_OF_EPOCH", 1)
    calls = replaying(monkeypatch)
    for mode in ("e2e", "compute"):
        calls.clear()
        found, _ = measure(replace(EAGER, tuning="tuned", mode=mode))
        assert calls[:4] == [5, 4, 5, 4]  # compiled and captured, then timed
        assert calls[-4:] == [5, 4] * 2
        assert found["timing"]["steps"] == 18


@pytest.mark.parametrize("mode", ["e2e", "compute"])
def test_epochs_that_come_as_one(measure: Any, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    """Twice two of 300 images, in batches of 128: four batches each time, by which schedule and progress go."""
    with_recipe(monkeypatch, epochs=4, evaluate_every=2)
    make, lengths = child.make_step, []
    monkeypatch.setattr(child, "make_step", lambda *given: (lengths.append(given[-1]), make(*given))[1])
    found, events = measure(replace(EAGER, mode=mode))
    assert found["timing"]["steps"] == 8
    assert lengths == [8]
    (stage,) = (event for event in events if event.get("stage") in ("train", "measure"))
    assert (stage["epochs"], stage["steps"]) == (4, 8)
    progress = [(event["progress"]["epoch"], event["progress"]["step"]) for event in events if "progress" in event]
    assert progress == sorted(progress)
    assert {epoch for epoch, _ in progress} == {2, 4}
    assert progress[-1] == (4, 8)
    if mode == "e2e":
        assert [row["epoch"] for row in found["accuracy"]["curve"]] == [2, 4]


@pytest.mark.gpu
@pytest.mark.parametrize("workload", ["mnist-cnn", "conv-autoencoder"])
def test_a_captured_run_learns_what_another_does(measure: Any, monkeypatch: pytest.MonkeyPatch, workload: Any) -> None:
    """Loader, memory and replays together, evaluation too, while the device lags far behind the host."""
    with_recipe(monkeypatch, batch_size=32)
    monkeypatch.setattr(dali, "STEPS_AT_ONCE", 4)
    monkeypatch.setattr(dali, "PARTS_OF_EPOCH", 1)
    replay = Captured.__call__

    def late(self: Any, *inputs: torch.Tensor) -> Any:
        torch.cuda._sleep(20_000_000)  # some 10 ms
        return replay(self, *inputs)

    monkeypatch.setattr(Captured, "__call__", late)
    curves = []
    for capture in (False, True):
        monkeypatch.setitem(
            TUNINGS, "fp32", lambda capability, capture=capture: replace(fp32(capability), capture=capture)
        )
        found, _ = measure(Case(workload=workload, suite="quick", tuning="fp32"))
        assert found["case"]["captured"] is capture
        curves.append([value for row in found["accuracy"]["curve"] for value in (row["train_loss"], row["metric"])])
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


# data


def test_the_images_of_a_part_are_spread_evenly(data: Path) -> None:
    workload = quick(mnist_cnn())
    part = replace(workload, recipe=replace(workload.recipe, train_images=4, eval_images=None))
    tuning = TUNINGS["eager"](None)
    whole = child.prepared.load("mnist", "train", data)
    picked = child.image_set(part, "train", tuning, data)
    assert picked.images is not None
    assert whole.images is not None
    assert picked.labels is not None
    assert whole.labels is not None
    np.testing.assert_array_equal(picked.images, whole.images[[0, 99, 199, 299]])
    np.testing.assert_array_equal(picked.labels, whole.labels[[0, 99, 199, 299]])
    assert len(child.image_set(part, "test", tuning, data)) == 100


def test_faces_are_decoded_once_and_by_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.make("anime_faces", tmp_path, sizes=(6, 4))
    monkeypatch.setattr(child.prepared, "HELD_OUT", 4)
    decode = Mock(wraps=dali.decode)
    monkeypatch.setattr(dali, "decode", decode)
    found = child.image_set(dcgan(), "train", TUNINGS["dali"](None), tmp_path)
    encoded = child.image_set(dcgan(), "train", TUNINGS["eager"](None), tmp_path)
    decode.assert_called_once_with(encoded.files, CPU)
    assert found.files is None
    assert found.images is not None
    assert encoded.files is not None
    expected = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in encoded.files])
    assert np.abs(found.images.astype(int) - expected).mean() < 1


def test_without_imagenet_weights_there_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(workload="resnet50-transfer", suite="full", tuning="tuned")
    workload = replace(resolve(case), network=lambda classes, weights: torch.nn.Linear(1, classes))
    monkeypatch.setattr(child.weights, "load", lambda: None)
    built, network = child.build(workload, 5)
    assert (built.weights, built.target) == ("random", None)
    assert describe(case, built)["recipe"]["weights"] == "random"
    monkeypatch.setattr(child.weights, "load", lambda: {})
    built, network = child.build(workload, 5)
    assert (built.weights, built.target) == ("imagenet", 89.05)
    assert network.out_features == 5


# how a run ends


def with_step(monkeypatch: pytest.MonkeyPatch, step: Any) -> None:
    class Player:
        def restart(self) -> None:
            pass

    monkeypatch.setattr(child, "make_step", lambda *arguments: (step, [Player()]))


def test_a_good_run_says_nothing_of_its_end(speak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "new_graphs", lambda: print("a library says hello", flush=True))
    found, last, error = speak()
    assert "status" not in last
    assert found["throughput"]["images_per_s"] > 0
    assert error == "a library says hello\n"  # not between the lines of the child


@pytest.mark.fault("a loss or a metric that is no number")
def test_an_absurd_learning_rate_diverges(speak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_recipe(monkeypatch, learning_rate=1e30)
    found, last, _ = speak()
    assert last["status"] == "diverged"
    assert "loss nan" in last["reason"] or "loss inf" in last["reason"]
    assert "data" in found


@pytest.mark.fault("a loss or a metric that is no number")
def test_divergence_keeps_the_curve(speak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 1.0, 1.0, 0.5, 0.5, 0.25, math.inf])  # first and second call, warm-up, two epochs of two steps
    with_step(monkeypatch, lambda images, labels: torch.tensor(next(losses)))
    found, last, _ = speak()
    assert last == {"status": "diverged", "reason": "training loss inf after 2 steps"}
    assert [(row["epoch"], row["train_loss"]) for row in found["accuracy"]["curve"]] == [(1, 0.5)]
    assert found["timing"]["steps"] == 2


@pytest.mark.gpu
@pytest.mark.fault("a card without memory left")
def test_a_full_card_ends_one_case_and_harms_no_other(data: Path, tmp_path: Path) -> None:
    """Full for another process, this one: the child finds room for its context, but not for its tensors."""
    here = machine.describe()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (700 << 20), dtype=torch.uint8, device="cuda")
    full = runner.run(EAGER, data=data, results=tmp_path, machine=here, listen=lambda event: None)
    assert full["status"] == "oom", full["reason"]
    del hog
    torch.cuda.empty_cache()
    again = runner.run(EAGER, data=data, results=tmp_path, machine=here, listen=lambda event: None)
    assert again["status"] == "ok"


@pytest.mark.fault("a card without memory left")
def test_out_of_memory(speak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([1.0, 1.0, 1.0, 0.5, 0.5])

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if (loss := next(steps, None)) is None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")
        return torch.tensor(loss)

    with_step(monkeypatch, step)
    found, last, _ = speak()
    assert last == {"status": "oom", "reason": "CUDA out of memory. Tried to allocate 2 GiB."}
    assert len(found["accuracy"]["curve"]) == 1


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.cuda.OutOfMemoryError(""), "oom", "no message"),
        (RuntimeError("CUDA error: an illegal\nsecond"), "failed", "RuntimeError: CUDA error: an illegal"),
        (RuntimeError("CUDA error: out of memory\nsecond"), "oom", "CUDA error: out of memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "oom", "CUBLAS_STATUS_ALLOC_FAILED when calling"),
        (
            RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
            "oom",
            "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        ),
        (RuntimeError("CUDNN_STATUS_NOT_INITIALIZED"), "failed", "RuntimeError: CUDNN_STATUS_NOT_INITIALIZED"),
        (KeyError(), "failed", "KeyError: no message"),
        (ValueError("x" * 900), "failed", "ValueError: " + "x" * 488),
    ],
)
def test_errors_become_a_status(
    speak: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, reason: str
) -> None:
    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise error

    with_step(monkeypatch, step)
    _, last, told = speak()
    assert last == {"status": status, "reason": reason}
    assert ("Traceback" in told) == (status == "failed")


def test_a_truncated_array_is_named(speak: Any, tmp_path: Path) -> None:
    folder = synthetic.make("mnist", tmp_path / "data", sizes=(300, 100))
    path = folder / "train.images.npy"
    path.write_bytes(path.read_bytes()[:-1_000])
    _, last, error = speak(data=tmp_path / "data")
    assert (last["status"], last["user_error"]) == ("failed", True)
    assert last["reason"].startswith(f"{path} is truncated")
    assert error == ""


def test_a_corrupt_image_is_named(speak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = synthetic.make("flowers", tmp_path / "data", sizes=(40, 10))
    for path in (folder / "train").rglob("*.jpg"):  # all of them, so that the first batch meets one
        content = bytearray(path.read_bytes())
        content[20:-20] = b"\0" * (len(content) - 40)  # its ends, which are looked at before the run, are sound
        path.write_bytes(content)
    _, last, _ = speak(Case(workload="resnet50-transfer", suite="quick", tuning="eager"), tmp_path / "data")
    assert (last["status"], last["user_error"]) == ("failed", True)
    assert re.match(rf"{folder}/train/\w+/\d+\.jpg", last["reason"])
    assert "\n" not in last["reason"]


# the course of training, with made-up evaluations


class TwoSteps:
    batches_at_once = 1
    batches_per_epoch = 2
    images_per_epoch = 8

    def epoch(self) -> Iterator[Batch]:
        for _ in range(2):
            yield Batch(images=torch.zeros(4, 1, 2, 2), labels=torch.zeros(4, dtype=torch.int64), valid=4)

    def close(self) -> None:
        pass


def course(workload: Workload, metrics: list[Any], folder: Path, every: int = 1, **references: float) -> dict[str, Any]:
    """The sections after training with these metrics, one every so many epochs: numbers, or pairs of PSNR and SSIM."""
    events: list[dict[str, Any]] = []
    left = iter(metrics)

    def evaluate() -> Evaluation:
        metric = next(left)
        value, further = (metric[0], {"ssim": metric[1]}) if isinstance(metric, tuple) else (metric, {})
        picture = None if workload.objective == "classify" else torch.zeros(3, 8, 8)
        return Evaluation(value, further, 100, picture)

    workload = replace(workload, recipe=replace(workload.recipe, epochs=every * len(metrics), evaluate_every=every))
    loader, step = TwoSteps(), lambda images, labels: torch.tensor(1.0)
    try:
        child.train(workload, step, evaluate, loader, CPU, lambda **event: events.append(event), folder, references)
    except child.Diverged as error:
        events.append({"section": "end", "value": {"reason": str(error)}})
    return sections(events)


@pytest.mark.parametrize(
    ("metrics", "reached", "epoch"),
    [([98.0, 99.0, 99.5], True, 2), ([99.5, 98.0, 98.9], False, None), ([90.0, 99.0], True, 2)],
)
def test_a_target_is_reached_by_the_final_metric(
    tmp_path: Path, metrics: list[float], reached: bool, epoch: int | None
) -> None:
    accuracy = course(mnist_cnn(), metrics, tmp_path)["accuracy"]
    assert (accuracy["target"], accuracy["reached"]) == (99.0, reached)
    assert (accuracy["final"], accuracy["best"]) == (metrics[-1], max(metrics))
    times = [row["train_s"] for row in accuracy["curve"]]
    assert accuracy["train_s_to_target"] == (pytest.approx(sum(times[:epoch]), abs=1e-6) if epoch else None)


def test_a_generator_must_take_away_most_of_the_distance(tmp_path: Path) -> None:
    accuracy = course(dcgan(), [50.0, 30.0, 27.5], tmp_path, real=10.0, untrained=80.0)["accuracy"]
    assert accuracy["target"] == 27.5  # 10 + ¼ (80 - 10)
    assert (accuracy["reached"], accuracy["best"], accuracy["final"]) == (True, 27.5, 27.5)
    assert accuracy["references"] == {"real": 10.0, "untrained": 80.0}
    assert course(dcgan(), [27.6], tmp_path, real=10.0, untrained=80.0)["accuracy"]["reached"] is False


@pytest.mark.parametrize(("ssim", "reached"), [(0.961, True), (0.959, False)])
def test_a_further_metric_must_be_reached_too(tmp_path: Path, ssim: float, reached: bool) -> None:
    workload = replace(conv_autoencoder(), target=27.0)
    accuracy = course(workload, [(27.5, ssim)], tmp_path)["accuracy"]
    assert accuracy["reached"] is reached
    assert accuracy["curve"][0]["metrics"] == {"ssim": ssim}


@pytest.mark.fault("a loss or a metric that is no number")
def test_a_metric_that_is_no_number_is_divergence(tmp_path: Path) -> None:
    found = course(mnist_cnn(), [97.0, math.nan, 98.0], tmp_path)
    assert found["end"] == {"reason": "test accuracy nan after epoch 2"}
    assert [row["metric"] for row in found["accuracy"]["curve"]] == [97.0]


@pytest.mark.parametrize("every", [1, 8])
def test_pictures_are_kept_of_some_evaluations_and_the_last(tmp_path: Path, every: int) -> None:
    course(replace(conv_autoencoder(), also_at_least=None), [20.0] * 13, tmp_path, every=every)
    kept = sorted(int(path.stem) for path in tmp_path.glob("*.webp"))
    assert kept == [every * number for number in (1, 2, 5, 10, 13)]
