"""ImageNet weights: read as tensors, never as a pickle that could run something."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from netdyno.bench.data import weights
from netdyno.bench.errors import UserError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights.path().parent.mkdir()
    return weights.path()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_tensors_come_back(file: Path) -> None:
    assert weights.load() is None
    torch.save({"fc.bias": torch.ones(3)}, file)
    found = weights.load()
    assert found is not None
    assert found["fc.bias"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.fault("weights that are damaged, or a pickle that would run something")
@pytest.mark.parametrize("kind", ["damaged", "empty", "a pickle", "torch's pickle"])
def test_what_is_no_tensor_is_refused_and_not_run(file: Path, tmp_path: Path, kind: str) -> None:
    bomb = Bomb(tmp_path / "exploded")
    torch.save({"fc.bias": torch.ones(3)} if kind == "damaged" else bomb, file)
    if kind == "damaged":
        file.write_bytes(file.read_bytes()[:-200])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "a pickle":
        file.write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError, match=r"holds no readable weights") as caught:
        weights.load()
    assert str(file) in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_fetched_weights_are_not_unpickled(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(type(weights.WEIGHTS), "get_state_dict", lambda self, **options: asked.append(options))
    weights.fetch(lambda line: None)
    assert asked == [{"progress": False, "check_hash": True, "weights_only": True}]
