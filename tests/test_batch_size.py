"""The search for the largest batch: its border, its tries, and children that end as they may."""

from pathlib import Path
from typing import Any

import pytest

from netdyno.bench import batch_size
from netdyno.bench.batch_size import GRAIN, SHARE, Found, find_batch_size, search
from netdyno.bench.errors import UserError
from netdyno.bench.order import Order
from netdyno.bench.workloads import Case

CASE = Case(workload="mnist-cnn", suite="quick", tuning="tuned")


@pytest.mark.parametrize("start", [1, 8, 100, 1_024, 5_000])
@pytest.mark.parametrize("border", [8, 9, 17, 100, 1_023, 4_096, 30_001])
def test_the_border_is_found_in_few_tries(start: int, border: int) -> None:
    """`border`: the largest that trains."""
    tried: list[int] = []

    def trains(batch: int) -> bool:
        tried.append(batch)
        return batch <= border

    found = search(trains, start=start, most=60_000)
    assert found.trains is not None
    assert found.fails is not None
    assert found.trains <= border < found.fails
    assert found.fails - found.trains <= max(GRAIN, found.trains // SHARE)
    assert len(tried) == len(set(tried)) <= 20
    assert all(batch % GRAIN == 0 for batch in tried)


def test_the_training_set_is_the_end() -> None:
    tried: list[int] = []
    found = search(lambda batch: not tried.append(batch), start=64, most=1_003)  # type: ignore[func-returns-value]
    assert (found, tried) == (Found(1_000, None), [64, 128, 256, 512, 1_000])


def test_nothing_trains() -> None:
    assert search(lambda batch: False, start=64, most=1_000) == Found(None, GRAIN)


def play(monkeypatch: pytest.MonkeyPatch, ends: dict[bool, tuple[str, str | None]]) -> list[Order]:
    """Children that end as `ends` says, by whether their batch is above 3,000."""
    orders: list[Order] = []

    def watch(order: Order, record: dict[str, Any], cache: Path, listen: Any) -> None:
        assert cache.is_dir()
        assert order.batch_size is not None
        orders.append(order)
        record["status"], record["reason"] = ends[order.batch_size > 3_000]

    monkeypatch.setattr(batch_size, "watch", watch)
    return orders


def find(tmp_path: Path) -> Found:
    return find_batch_size(CASE, images=60_000, data=tmp_path, machine={"gpu": "a card"}, listen=lambda event: None)


def test_each_try_is_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    orders = play(monkeypatch, {False: ("ok", None), True: ("oom", "CUDA out of memory")})
    assert find(tmp_path) == Found(2_944, 3_008)
    assert [order.batch_size for order in orders[:3]] == [128, 256, 512]
    assert all(order.compile_only and order.case == CASE and not order.pictures.exists() for order in orders)


def test_another_end_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    play(monkeypatch, {False: ("ok", None), True: ("failed", "CUDA error")})
    with pytest.raises(UserError, match=r"batches of 4,096: failed: CUDA error"):
        find(tmp_path)
