"""Speed of the augmentation: the reference on the CPU, the kernel on a GPU, beside the copy limit of its bytes."""

from collections.abc import Callable

import pytest
import torch

from netdyno.kernels.augment import Moves, augment

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
GROUP = pytest.mark.benchmark(group="augment 32×32×3")


def inputs(stored: int, batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor, Moves]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (stored, 32, 32, 3), dtype=torch.uint8, generator=draw)
    index = torch.randint(0, stored, (batch,), generator=draw)
    shift = torch.randint(-4, 5, (batch, 2), dtype=torch.int32, generator=draw)
    flip = torch.randint(0, 2, (batch,), dtype=torch.uint8, generator=draw)
    return images.to(device), index.to(device), Moves(shift.to(device), flip.to(device))


@GROUP
def test_reference_on_the_cpu(rate: Callable[..., None]) -> None:
    arguments = inputs(1_024, 256, "cpu")
    rate(lambda: augment(*arguments, MEAN, STD, torch.float32), 256, on_gpu=False)


@pytest.mark.gpu
@GROUP
@pytest.mark.parametrize("moved", [True, False], ids=["moved", "unmoved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_kernel_on_the_gpu(rate: Callable[..., None], copy_bytes_per_s: float, dtype: torch.dtype, moved: bool) -> None:
    batch, launches = 8_192, 20
    images, index, moves = inputs(16_384, batch, "cuda")

    def run() -> None:
        for _ in range(launches):
            augment(images, index, moves if moved else None, MEAN, STD, dtype)

    limit = copy_bytes_per_s / (3_072 * (1 + dtype.itemsize))
    rate(run, launches * batch, on_gpu=True, limit_images_per_s=limit)
