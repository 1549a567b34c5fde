"""Speed of a training step, of DALI's loader and of an evaluation: small and eager on a CPU, as `tuned` on a GPU."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from netdyno.bench.data import dali
from netdyno.bench.step import DTYPES, make_step
from netdyno.bench.train import make_evaluation
from netdyno.bench.tuning import Tuning, eager, tuned
from netdyno.bench.workloads import Workload, cifar10_cnn, conv_autoencoder, mnist_cnn

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
WORKLOADS = [mnist_cnn(), cifar10_cnn(), conv_autoencoder()]


def setting(workload: Workload, device: str) -> tuple[Workload, torch.nn.Module, Tuning]:
    """The workload with a batch for this device, its network there, and the tuning."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = workload.network(10) if workload.objective == "classify" else workload.network()
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device == "cuda":
        return workload, network, tuned(torch.cuda.get_device_capability())
    small = replace(workload, recipe=replace(workload.recipe, batch_size=16), eval_batch_size=16)
    return small, network, eager(None)


def pictures(workload: Workload, count: int) -> np.ndarray:
    side, channels = (28, 1) if workload.dataset == "mnist" else (32, 3)
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)


@pytest.mark.benchmark(group="training step, compute only")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_step(rate: Callable[..., None], workload: Workload, device: str) -> None:
    workload, network, tuning = setting(workload, device)
    batch = workload.recipe.batch_size
    step, _ = make_step(workload, network, tuning, torch.device(device), steps=1_000)
    scaled = torch.from_numpy(pictures(workload, batch)).permute(0, 3, 1, 2) / 255
    images = scaled.to(device, DTYPES[tuning.precision]).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10
    rate(lambda: step(images, labels), batch, on_gpu=device == "cuda")


@pytest.mark.benchmark(group="DALI, an epoch")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_loader(rate: Callable[..., None], monkeypatch: pytest.MonkeyPatch, resident: bool, device: str) -> None:
    on_gpu = device == "cuda"
    workload = cifar10_cnn()
    images = pictures(workload, 50_000 if on_gpu else 512)
    if not resident:
        monkeypatch.setattr(dali, "RESIDENT_BYTES", 0)
    loader = dali.array_loader(
        images,
        None,
        preprocess=workload.preprocess,
        batch_size=512 if on_gpu else 64,
        train=True,
        seed=0,
        device=torch.device(device),
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    with closing(loader):
        rate(lambda: sum(len(batch.images) for batch in loader.epoch()), loader.images_per_epoch, on_gpu=on_gpu)


@pytest.mark.benchmark(group="evaluation")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_evaluation(rate: Callable[..., None], workload: Workload, device: str) -> None:
    on_gpu = device == "cuda"
    workload, network, tuning = setting(workload, device)
    images = pictures(workload, 10_000 if on_gpu else 64)
    load = partial(dali.array_loader, images, np.arange(len(images)) % 10, preprocess=workload.preprocess, train=False)
    where = torch.device(device)
    with closing(
        load(batch_size=workload.eval_batch_size, seed=0, device=where, dtype=torch.float32, into=None)
    ) as loader:
        tuning = replace(tuning, capture=False)  # without memory of its own, each batch would be a graph
        rate(make_evaluation(workload, network, loader, tuning, where), len(images), on_gpu=on_gpu)
