"""ImageNet weights of ResNet-50, from torchvision, kept where torch.hub keeps them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torchvision.models import ResNet50_Weights

from ..errors import UserError

WEIGHTS = ResNet50_Weights.IMAGENET1K_V1  # the ones whose frozen features the source used


def path() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS.url.rsplit("/", 1)[-1]


def fetch(report: Callable[[str], None]) -> None:
    """Downloads the weights unless they are there; torchvision checks the hash in their name.

    Raises:
        UserError: they cannot be fetched.
    """
    if path().exists():
        return report(f"ImageNet weights: already in {path()}")
    try:
        WEIGHTS.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"ImageNet weights cannot be fetched ({error}); ResNet-50 starts from random ones") from error
    report(f"ImageNet weights: fetched into {path()}")


def load() -> Mapping[str, torch.Tensor] | None:
    """The state dict, or None where it was not fetched. UserError where the file is no state dict."""
    if not path().exists():
        return None
    try:
        return torch.load(path(), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"{path()} holds no readable weights; delete it and fetch it again ({type(error).__name__})"
        ) from error
