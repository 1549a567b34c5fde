"""Cases spread over cards. Cards are names here and cases functions: it shows who runs when, and no GPU's speed."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from netdyno.bench.errors import UserError
from netdyno.bench.runner import Post
from netdyno.bench.side_by_side import spread
from netdyno.bench.workloads import Case

CARDS = ("GPU-a", "GPU-b")
PATIENCE_S = 10.0


def cases(count: int) -> list[tuple[int, Case]]:
    return [(seed, Case(workload="mnist-cnn", suite="quick", tuning="tuned", seed=seed)) for seed in range(count)]


def test_each_card_runs_one_case_at_a_time_and_both_run_at_once() -> None:
    both = threading.Barrier(2)
    busy: dict[str, int] = {}
    ran = []

    def run(number: int, case: Case, post: Post) -> None:
        assert busy.setdefault(post.card, number) == number
        both.wait(PATIENCE_S)  # passes only while the other card has a case too
        assert len(post.beside) >= 1
        ran.append((number, case.seed))
        del busy[post.card]

    spread(cases(6), CARDS, run)
    assert sorted(ran) == [(seed, seed) for seed in range(6)]


def test_a_card_that_is_free_takes_the_next_case_and_each_is_told_what_ran_beside_it() -> None:
    others = threading.Semaphore(0)
    beside: dict[int, list[str]] = {}

    def run(number: int, case: Case, post: Post) -> None:
        beside[number] = post.beside
        if number == 0:
            assert (post.number, post.card) == (0, "GPU-a")
            assert all(others.acquire(timeout=PATIENCE_S) for _ in range(3))
        else:
            assert (post.number, post.card) == (1, "GPU-b")
            others.release()

    spread(cases(4), CARDS, run)
    assert beside[0] == [f"mnist-cnn tuned e2e seed {seed} on card 1" for seed in (1, 2, 3)]
    assert beside[1] == beside[2] == beside[3] == ["mnist-cnn tuned e2e seed 0 on card 0"]


def test_what_one_case_raises_ends_the_others_first() -> None:
    both = threading.Barrier(2)
    ended = []

    def run(number: int, case: Case, post: Post) -> None:
        both.wait(PATIENCE_S)
        if number == 0:
            raise UserError("no space left on the disk")
        assert post.stop.wait(PATIENCE_S)
        ended.append(number)

    with pytest.raises(UserError, match="no space"):
        spread(cases(5), CARDS, run)
    assert ended == [1]  # and the three that waited never began


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_ctrl_c_reaches_every_card() -> None:
    both = threading.Barrier(2)
    ended = []

    def run(number: int, case: Case, post: Post) -> None:
        if both.wait(PATIENCE_S) == 0:
            time.sleep(0.1)  # CPython heeds a signal that comes just before a thread waits only after the wait
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # wakes it up, as a terminal's does
        assert post.stop.wait(PATIENCE_S)
        time.sleep(0.1)  # its record is written
        ended.append(number)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spread(cases(5), CARDS, run)
    assert sorted(ended) == [0, 1]


def test_ctrl_c_while_the_threads_start_lets_no_case_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    class Interrupted(ThreadPoolExecutor):
        def submit(self, serve: Callable[..., None], /, card: int, taken: object) -> Future[None]:  # type: ignore[override]
            served = super().submit(serve, card, taken)
            if card == 1:
                begun.wait(0.2)  # time enough for a case that does not wait
                raise KeyboardInterrupt
            return served

    monkeypatch.setattr("netdyno.bench.side_by_side.ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        spread(cases(2), CARDS, lambda number, case, post: begun.set())
    assert not begun.is_set()
