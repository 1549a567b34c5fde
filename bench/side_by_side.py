"""Different cases on different cards of one machine at once, without a word between them: `netdyno run --parallel`.

Each card has a thread, which takes the next case when its last one has ended. Every case still runs in a child of its
own, by `runner.run`.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from .runner import Post
from .workloads import Case


def spread(cases: Iterable[tuple[int, Case]], cards: Sequence[str], run: Callable[[int, Case, Post], None]) -> None:
    """Calls `run` once for each case, with its number, one at a time on each card; returns when all have ended.

    Ctrl-C, and whatever one `run` raises, keeps cases from starting, tells the running ones by `Post.stop`, and is
    raised again when they have ended too.
    """
    waiting = deque(cases)
    running: dict[int, tuple[str, list[str]]] = {}  # card → its case, and what runs beside that
    lock = threading.Lock()
    begin = threading.Event()  # set when the pool knows all its threads, so that it waits for each that runs a case
    stop = threading.Event()
    ended: SimpleQueue[Future[None]] = SimpleQueue()  # unlike `as_completed`, whole when Ctrl-C comes while it waits

    def take(card: int) -> tuple[int, Case, Post] | None:
        """The next case, for that card, with what runs beside it; None where there is no more."""
        with lock:
            if not waiting:
                return None
            number, case = waiting.popleft()
            here = f"{case} on card {card}"
            beside = [other for other, _ in running.values()]
            for _, others in running.values():
                others.append(here)
            running[card] = (here, beside)
            return number, case, Post(number=card, card=cards[card], beside=beside, stop=stop)

    def serve(card: int, taken: tuple[int, Case, Post] | None) -> None:
        while not begin.wait(1.0) and not stop.is_set():
            pass
        while taken is not None and not stop.is_set():
            try:
                run(*taken)
            finally:
                with lock:
                    del running[card]
            taken = take(card)

    with ThreadPoolExecutor(len(cards)) as pool:
        try:
            for card in range(len(cards)):
                pool.submit(serve, card, take(card)).add_done_callback(ended.put)
            begin.set()
            for _ in cards:
                ended.get().result()
        finally:
            stop.set()
