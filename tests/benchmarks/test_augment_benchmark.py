"""Speed of the augmentation: the reference on the CPU, the kernel on a GPU, beside the copy limit of its bytes."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from netdyno.kernels.augment import augment

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def inputs(stored: int, batch: int, device: str) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (stored, 32, 32, 3), dtype=torch.uint8, generator=draw)
    index = torch.randint(0, stored, (batch,), generator=draw)
    shift = torch.randint(-4, 5, (batch, 2), dtype=torch.int32, generator=draw)
    flip = torch.randint(0, 2, (batch,), dtype=torch.uint8, generator=draw)
    return tuple(tensor.to(device) for tensor in (images, index, shift, flip))


@pytest.mark.benchmark(group="augment 32×32×3")
def test_reference_on_the_cpu(benchmark: BenchmarkFixture) -> None:
    batch = 256
    result = benchmark(augment, *inputs(1024, batch, "cpu"), MEAN, STD, torch.float32)
    assert result.shape == (batch, 3, 32, 32)
    if benchmark.stats:  # none under --benchmark-disable
        benchmark.extra_info["images_per_s"] = batch / benchmark.stats.stats.median


@pytest.mark.gpu
@pytest.mark.benchmark(group="augment 32×32×3")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernel_on_the_gpu(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    batch, launches = 8192, 20
    arguments = inputs(16_384, batch, "cuda")

    def run() -> None:
        for _ in range(launches):
            augment(*arguments, MEAN, STD, dtype)
        torch.cuda.synchronize()

    benchmark(run)
    if benchmark.stats:
        images_per_s = batch * launches / benchmark.stats.stats.median
        source, target = torch.empty(2, 1 << 28, dtype=torch.uint8, device="cuda")
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        target.copy_(source)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        copy_bytes_per_s = 2 * source.numel() / (start.elapsed_time(end) / 1000)
        benchmark.extra_info["images_per_s"] = images_per_s
        benchmark.extra_info["share_of_copy_limit"] = images_per_s * 3072 * (1 + dtype.itemsize) / copy_bytes_per_s
