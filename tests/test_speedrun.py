"""The open division on a CPU: seeds that are independent and can be repeated, and what their records hold."""

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from netdyno.bench import child, machine, runner, speedrun
from netdyno.bench.data import synthetic
from netdyno.bench.order import Order
from netdyno.bench.speedrun import Speedrun, least_sure, views
from netdyno.bench.stats import bootstrap_interval
from netdyno.bench.tuning import Tuning, captured
from netdyno.bench.workloads import Case, OpenRecipe, resolve

SMALL = {"batch_size": 32, "train_images": 192, "eval_images": 100}
CASE = Case(workload="cifar10-94", suite="quick", tuning="captured", seeds=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("mnist", "cifar10", "cifar100"):
        synthetic.make(name, root, sizes=(200, 100))
    return root


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, on few images."""
    monkeypatch.setattr(child, "resolve", lambda case: replace(resolve(case), recipe=small(resolve(case).recipe)))
    monkeypatch.setattr(child, "TUNINGS", {"captured": uncompiled})
    monkeypatch.setattr(speedrun, "CHUNK", 50)
    monkeypatch.setattr(speedrun, "WHITENED", 20)


def small(recipe: Any) -> OpenRecipe:
    return replace(recipe, **SMALL)


def uncompiled(capability: Any) -> Tuning:
    return replace(captured(None), compile=False, fused_optimizer=False)


def run(data: Path, case: Case) -> dict[str, Any]:
    sections: dict[str, Any] = {}

    def hear(**event: Any) -> None:
        if "section" in event:
            sections[event["section"]] = sections.get(event["section"], {}) | event["value"]

    child.run(Order(case=case, data=data, pictures=data, started=time.time()), hear)
    return sections


@pytest.mark.parametrize("workload", ["mnist-99", "cifar10-94", "cifar100-70"])
def test_a_seed_does_not_hang_on_those_before(data: Path, workload: str) -> None:
    case = replace(CASE, workload=workload)
    three = run(data, case)["accuracy"]["seeds"]
    (alone,) = run(data, replace(case, seed=2, seeds=1))["accuracy"]["seeds"]
    assert alone["metric"] == three[2]["metric"]
    assert [row["seed"] for row in three] == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("workload", ["mnist-99", "cifar10-94", "cifar100-70"])
def test_a_captured_seed_does_not_hang_on_those_before(
    data: Path, workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for each size of images, restarted in place; within what atomic sums leave open."""
    monkeypatch.setattr(child, "TUNINGS", {"captured": captured})
    case = replace(CASE, workload=workload)
    three = run(data, case)["accuracy"]["seeds"]
    (alone,) = run(data, replace(case, seed=2, seeds=1))["accuracy"]["seeds"]
    assert alone["metric"] == pytest.approx(three[2]["metric"], abs=3)


def test_seeds_differ_in_what_they_see_and_repeat_it(data: Path) -> None:
    setting = child.set_up(Order(case=CASE, data=data, pictures=data, started=0.0), lambda **event: None)
    with closing(Speedrun(setting)) as made:
        step = made._step

        def batches_of(seed: int) -> list[torch.Tensor]:
            kept = []

            def spied(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                kept.append(images.clone())
                return step(images, labels)

            made._step = spied
            clock, memory = child.BlockClock(setting.device, made.steps), child.PeakMemory(setting.device)
            _, loss = made.run(seed, clock, memory, lambda steps: None)
            losses.append(loss)
            return kept

        losses: list[float] = []
        one, other, again = batches_of(0), batches_of(1), batches_of(0)
    assert losses[0] == losses[2] != losses[1]  # to the last bit: nothing is left of the seed before
    assert all(torch.equal(*pair) for pair in zip(one, again, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert [images.shape[2] for images in one] == [24] * 3 + [32] * 3


def test_what_a_record_holds(data: Path) -> None:
    found = run(data, CASE)
    accuracy, timing = found["accuracy"], found["timing"]
    metrics = [row["metric"] for row in accuracy["seeds"]]
    assert accuracy["final"] == pytest.approx(fmean(metrics), abs=1e-4)
    low, _ = bootstrap_interval(metrics, lambda resamples: resamples.mean(axis=-1), confidence=0.9)
    assert accuracy["lower_bound"] == pytest.approx(low, abs=1e-4)
    assert accuracy["target"] is accuracy["reached"] is accuracy["surely"] is None  # a quick run has none
    evaluations_s = 300 / found["throughput"]["eval_images_per_s"]
    assert sum(row["train_s"] for row in accuracy["seeds"]) == pytest.approx(
        timing["train_s"] + evaluations_s, rel=0.01
    )
    assert timing["steps"] == 3 * 6  # half an epoch of 24 pixels and half of 32: 192 images by 32
    assert found["throughput"]["images_per_s"] == pytest.approx(18 * 32 / timing["train_s"], rel=1e-3)
    assert found["case"]["seeds"] == [0, 1, 2]
    assert len(timing["block_s"]) == 18  # the evaluations are none of them
    assert 0 < timing["train_s"] - sum(timing["block_s"]) + 1e-4 < 0.1  # what the loader does as a seed ends
    assert found["throughput"]["eval_images_per_s"] > 0
    assert found["case"]["recipe"]["sides"] == ((24, 0.5), (32, 0.5))


def test_a_seeds_time_holds_its_evaluation_and_its_speed_does_not(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Speedrun._evaluate
    monkeypatch.setattr(Speedrun, "_evaluate", lambda self: (time.sleep(3), evaluate(self))[1])
    found = run(data, replace(CASE, workload="mnist-99", seeds=1))
    (row,) = found["accuracy"]["seeds"]
    assert row["train_s"] > 3 > found["timing"]["train_s"]


@pytest.mark.parametrize(
    ("metrics", "reached", "surely"),
    [([94.2, 94.1], True, True), ([93.5, 94.6], True, False), ([93.0, 94.0], False, False)],
)
def test_targets(
    data: Path, metrics: list[float], reached: bool, surely: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, suite="open")
    setting = child.set_up(Order(case=case, data=data, pictures=data, started=0.0), lambda **event: None)
    seeds = [{"seed": n, "train_s": 1.0 + n, "metric": metric} for n, metric in enumerate(metrics)]
    few = speedrun.accuracy(setting, seeds)
    assert few["target"] is few["reached"] is few["surely"] is few["train_s_to_target"] is None
    monkeypatch.setattr(speedrun, "FEWEST", 2)
    found = speedrun.accuracy(setting, seeds)
    assert (found["reached"], found["surely"]) == (reached, surely)
    assert found["train_s_to_target"] == (1.5 if reached else None)


def test_views() -> None:
    images = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    seen = views(images).unflatten(0, (6, 2))
    assert torch.equal(seen[0], images)
    assert torch.equal(seen[1][:, :, 1:, 1:], images[:, :, :-1, :-1])
    assert torch.equal(seen[1][:, :, 0, 1:], images[:, :, 1, :-1])  # reflected
    assert torch.equal(seen[2][:, :, :-1, :-1], images[:, :, 1:, 1:])
    assert torch.equal(seen[3:], seen[:3].flip(4))


def test_least_sure() -> None:
    logits = torch.tensor([[5.0, 0.0], [0.1, 0.0], [0.0, 3.0], [0.0, 0.2]])
    assert sorted(least_sure(logits, 2).tolist()) == [1, 3]


def test_other_loaders_and_modes_are_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "TUNINGS", {"captured": lambda capability: replace(uncompiled(None), loader="torch")})
    with pytest.raises(child.UserError, match="fed by DALI"):
        run(data, CASE)
    with pytest.raises(child.UserError, match="leave --mode and --trace out"):
        run(data, replace(CASE, mode="compute"))


@pytest.mark.slow
def test_a_record_of_the_open_division_is_whole(data: Path, tmp_path: Path) -> None:
    """In a process of its own, compiled."""
    case = replace(CASE, workload="mnist-99", tuning="tuned", seeds=2)
    record = runner.run(case, data=data, results=tmp_path, machine=machine.describe(), listen=lambda event: None)
    assert (record["status"], record["reason"]) == ("ok", None)
    assert len(record["accuracy"]["seeds"]) == 2
    assert record["compile"]["recompiles"] == 0
