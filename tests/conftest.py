"""What all tests share: the rules for tests that need a GPU or real images."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

THREADS = 1  # of torch: the tests' tensors are small, and threads that wait for a busy core took 18 s for 0.2 s of work


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in for_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none here"))
    loaded = sys.modules.get("torch")  # not imported here: tests of tables and statistics run without it
    if loaded is not None:
        loaded.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _collectable() -> Iterator[None]:
    """A case that is timed leaves what there is out of garbage collections."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real image sets, in the prepared format."""
    root = os.environ.get("NETDYNO_DATA")
    if not root:
        pytest.skip("needs real images: $NETDYNO_DATA is not set")
    if not Path(root).is_dir():
        pytest.fail(f"$NETDYNO_DATA is {root}, which is no folder")
    return Path(root)


@pytest.fixture
def _heeds_ctrl_c() -> Iterator[None]:
    """A shell lets what it runs in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
