"""Several ranks: what they exchange, that together they do what one does, and how they end.

On the CPU ranks are processes that exchange by gloo. Tests of several GPUs are skipped where there are fewer.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_child import documented

from netdyno.bench import cli, machine, parallel, runner, schema
from netdyno.bench.data import baseline, dali, synthetic
from netdyno.bench.data.loader import Loader, Share, count_epoch
from netdyno.bench.errors import UserError
from netdyno.bench.gpu import Gpu
from netdyno.bench.record import load_all
from netdyno.bench.workloads import Case, Preprocess, find, resolve

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
EAGER = Case(workload="mnist-cnn", suite="quick", tuning="eager", gpus=2)


def in_ranks(script: str, *arguments: str, count: int = 2) -> list[str]:
    """What each of `count` processes prints that run `script` as ranks, which end at once as those of a run do."""
    script += "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[str]] = []
    with ExitStack() as started:
        for rank in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", script, *arguments],
                env=runner.child_environment() | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(started.enter_context(process))
            started.callback(process.kill)
        said = []
        for process in processes:
            out, error = process.communicate(timeout=180)
            assert process.returncode == 0, error
            said.append(out)
    return said


# What ranks exchange


EXCHANGE = """
import torch
from torch import nn
from netdyno.bench import parallel

parallel.join(torch.device("cpu"))
me, count = parallel.rank(), parallel.ranks()
assert count == 3
assert parallel.every(10.5 * me) == [0.0, 10.5, 21.0]
assert parallel.slowest(-me) == 0
assert parallel.total(torch.tensor([me, 2**40])).tolist() == [3, 3 * 2**40]
assert len({*parallel.every(parallel.seed_of(7))}) == 3
assert parallel.seed_of(7) == 7 or me > 0

large = (torch.arange(24.0).view(2, 3, 2, 2) + me).to(memory_format=torch.channels_last)
gradients = [torch.full((5,), 0.5 * me), large, torch.tensor(1.0), 3 * large[:1]]
parallel.LARGE = large.numel()
assert parallel.buckets(gradients) == [[1], [0, 2, 3]]
orders = [parallel.in_memory(gradient) for gradient in gradients]
assert orders == [[0], [0, 2, 3, 1], [], [0, 2, 3, 1]]
gradients[1] = large.contiguous()  # as a trace may show it
summed = parallel.sums(gradients, orders, torch.bfloat16)
assert [one.dtype for one in summed] == [torch.float32] * 4
assert torch.equal(summed[1], (3 * torch.arange(24.0).view(2, 3, 2, 2) + 3).bfloat16().float())
assert summed[1].stride() == large.stride()
exact = parallel.sums(gradients, orders, torch.float32)
assert torch.equal(exact[1], 3 * torch.arange(24.0).view(2, 3, 2, 2) + 3)
assert torch.equal(gradients[1], large)  # what is sent on its own is no alias of what came
assert summed[0].tolist() == [1.5] * 5
assert summed[2].item() == 3
assert torch.equal(summed[3], 9 * torch.arange(12.0).view(1, 3, 2, 2) + 9)
loss = torch.tensor(6.0)
assert parallel.share(loss).item() == 2

torch.manual_seed(me)
network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
parallel.broadcast(network)
weights = torch.cat([weight.flatten() for weight in network.parameters()]).sum().item()
assert len({*parallel.every(weights)}) == 1
network[1].running_mean.fill_(me)
network[1].running_var.fill_(2.0 * me)
network[2].eval().running_mean.fill_(me)
parallel.average_statistics(network)
assert network[1].running_mean.tolist() == [1.0, 1.0]
assert network[1].running_var.tolist() == [2.0, 2.0]
assert network[2].running_mean.tolist() == [me, me]  # it does not train
parallel.leave()
print("as it should be")
"""


@pytest.mark.slow
def test_what_ranks_exchange() -> None:
    assert in_ranks(EXCHANGE, count=3) == ["as it should be\n"] * 3


def test_one_rank_gives_back_what_it_gets() -> None:
    network, loss = torch.nn.Linear(1, 1), torch.ones(3)
    assert parallel.adding_up(network, torch.float32) is network
    assert parallel.share(loss) is loss
    assert parallel.total(loss) is loss
    assert (parallel.rank(), parallel.ranks(), parallel.every(2.5), parallel.seed_of(3)) == (0, 1, [2.5], 3)
    parallel.leave()


OVERLAP = """
import re, sys
import torch
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
from new_network import tiny_cnn
from torch import nn
from torch._inductor.utils import run_and_get_code
from netdyno.bench import parallel
from netdyno.bench.step import make_step
from netdyno.bench.tuning import eager

parallel.join(torch.device("cpu"))
parallel.LARGE = 128  # elements: the weights of the last two layers
torch.set_num_threads(1)
torch.manual_seed(parallel.rank())
images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])

def train(compiled):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 2)]
    network = nn.Sequential(*layers)
    step, _ = make_step(tiny_cnn(), network, replace(eager(None), compile=compiled), torch.device("cpu"), steps=9)
    losses, code = run_and_get_code(lambda: torch.stack([step(images, labels) for _ in range(3)]))
    weights = torch.cat([weight.detach().flatten() for weight in network.parameters()])
    with parallel.apart():
        alone = step(images, labels).item()
        step(images, labels)
    after = sum(weight.sum().item() for weight in network.parameters())
    return losses, weights, alone, after, code

losses, weights, alone, after, _ = train(False)
*compiled, (_, backward, *_) = train(True)
torch.testing.assert_close(compiled, [losses, weights, alone, after])
assert len({*parallel.every(weights.sum().item())}) == 1
assert len({*parallel.every(after)}) == 2
of_a_sum = "mm|convolution_backward|all_reduce_|wait_tensor"
print(*re.findall(rf"(?:torch.ops|extern_kernels)[.a-z0-9_]*[.]({of_a_sum})(?:[.]default)?[(]", backward))
parallel.leave()
"""


@pytest.mark.slow
def test_compiled_sums_are_on_their_way_during_the_backward_pass() -> None:
    """Of two ranks, with the losses and weights of eager ones; apart they go their own ways.

    A layer's weights get their gradient, whose sum starts, before its images theirs.
    """
    second, first = "convolution_backward all_reduce_ convolution_backward", "convolution_backward all_reduce_"
    order = f"mm all_reduce_ mm {second} {first} wait_tensor wait_tensor wait_tensor\n"
    assert in_ranks(OVERLAP, str(Path(__file__).parent)) == [order] * 2


SHARED_UPDATE = """
import copy, os, sys
import torch
from torch import nn
from netdyno.bench import adam, parallel, sharded
from netdyno.bench.capture import Captured

class Mapped:
    \"\"\"A Room of processes that share files.\"\"\"

    made = 0

    def __init__(self, size):
        Mapped.made += 1
        self._paths = [f"{sys.argv[2]}/{Mapped.made}-{rank}" for rank in range(parallel.ranks())]
        self._size = size
        self.own(0, size, torch.uint8)
        self.meet()

    def own(self, start, count, dtype):
        return self.view(parallel.rank(), start, count, dtype)

    def view(self, rank, start, count, dtype):
        whole = torch.from_file(self._paths[rank], shared=True, size=self._size, dtype=torch.uint8)
        return whole[start : start + count * dtype.itemsize].view(dtype)

    def meet(self):
        parallel.meet()

class Network(nn.Module):
    \"\"\"Whose weights get what it is given as their gradients.\"\"\"

    def __init__(self):
        super().__init__()
        shapes = [[int(size) for size in shape.split("x")] for shape in sys.argv[4].split()]
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.to(device, memory_format=torch.channels_last)

    def forward(self, *drawn):
        return sum((weight.float() * values).sum() for weight, values in zip(self.weights, drawn, strict=True))

if sys.argv[1] == "cuda":
    parallel.see_own_gpu()
device = torch.device(sys.argv[1])
parallel.join(device)
if device.type == "cpu":
    assert not parallel.updates_are_shared()
    sharded.Room, parallel._reach = Mapped, True
elif not parallel.updates_are_shared():
    print("no way to each other")
    sys.stdout.flush()
    os._exit(0)
me, count = parallel.rank(), parallel.ranks()
adam.LARGE = 100
torch.manual_seed(0)
network = Network()
adam.keep_large_in(torch.bfloat16, network.parameters())
alone = copy.deepcopy(network)
strides = [weight.stride() for weight in network.parameters()]
options = {"lr": 1e-2, "betas": (0.5, 0.999), "weight_decay": 0.1}
if sys.argv[3] == "captured":
    options["lr"] = torch.tensor(1e-2, device=device)
compiled = sys.argv[3] != "eager"
optimizer = adam.MasterAdam(list(network.parameters()), compiled, **options)
with parallel.apart():
    reference = adam.MasterAdam(list(alone.parameters()), compiled, **options)
assert [weight.stride() for weight in network.parameters()] == strides

loss = torch.compile(network, fullgraph=True) if compiled else network

def one(*drawn):
    result = loss(*drawn)
    result.backward()
    optimizer.step()
    optimizer.zero_grad()
    return result.detach()

given = [torch.zeros(weight.shape, device=device) for weight in network.parameters()]
if sys.argv[3] == "captured":
    one = Captured(one, "train")

def check():
    # A GPU's two compiled updates need not fuse the same multiplications with additions: a rounding now and then, which
    # turns over that of a weight to 16 bits in some 5 of 100,000.
    exact = device.type == "cpu"
    rounding = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-7}
    pairs = zip(network.parameters(), alone.parameters(), strict=True)
    for (weight, expected), portion in zip(pairs, optimizer.sharded.portions, strict=True):
        mine, right = (parallel.as_it_lies(values)[portion.part] for values in (weight, expected))
        if weight.dtype is torch.bfloat16:
            mine = adam.master_of(mine, optimizer.state[weight]["rest"])
            right = adam.master_of(right, reference.state[expected]["rest"][portion.part])
        torch.testing.assert_close(mine, right, **rounding)
        if exact or weight.dtype is torch.bfloat16:  # what came of other ranks, too
            assert (weight != expected).sum() <= (0 if exact else 1 + weight.numel() // 1_000)
        assert len({*parallel.every(weight.double().sum().item())}) == 1

check()
initial = copy.deepcopy(network.state_dict())
for turn in range(2):
    for step in range(3):
        drawn = []
        for place, expected in enumerate(alone.parameters()):
            draw = torch.Generator().manual_seed(100 * turn + 10 * step + place)
            values = torch.randint(-9, 10, (count, *expected.shape), generator=draw).to(device, torch.float32)
            if expected.dtype is torch.float32:
                values /= 7  # so that a sum hangs on its order; those of large weights are numbers that 16 bits hold
            drawn.append(values)
            expected.grad = torch.empty_like(expected).copy_(sum(values))
        for place, values in zip(given, drawn, strict=True):
            place.copy_(values[me])
        one(*given)
        reference.step()
        if sys.argv[3] != "captured" or turn:  # a first call does its work twice
            check()
    for made in (optimizer, reference):
        for state in made.state.values():
            for value in state.values():
                value.zero_()
    for made in (network, alone):
        made.load_state_dict(initial)
large = [weight for weight in network.parameters() if weight.dtype is torch.bfloat16]
assert len(large) == 2
for weight in large:
    mine = len(optimizer.state[weight]["rest"])
    assert mine < weight.numel() == sum(parallel.every(mine))
parallel.leave()
print("as it should be")
"""


WEIGHTS = "24x16x3x3 7 30x217 5x4x2x2"
SMALL_WEIGHTS = "10x15 7 13x31 2"  # of three ranks or four the last has no part of either large one


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize(("count", "weights"), [(2, WEIGHTS), (3, WEIGHTS), (3, SMALL_WEIGHTS)])
def test_ranks_share_an_update_out(count: int, weights: str, how: str, tmp_path: Path) -> None:
    """With the weights that one rank has by the sum of the gradients, on a CPU to the bit; in all ranks the same."""
    assert in_ranks(SHARED_UPDATE, "cpu", str(tmp_path), how, weights, count=count) == ["as it should be\n"] * count


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["compiled", "captured"])
@pytest.mark.parametrize(("count", "weights"), [(2, WEIGHTS), (4, WEIGHTS), (4, SMALL_WEIGHTS)])
def test_gpus_share_an_update_out(count: int, weights: str, how: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    said = in_ranks(SHARED_UPDATE, "cuda", str(tmp_path), how, weights, count=count)
    if said == ["no way to each other\n"] * count:
        pytest.skip("the GPUs do not reach each other's memory")
    assert said == ["as it should be\n"] * count


# Images


N, GREY = 43, 5  # images of one grey level each, GREY · their number
ARRAY = Preprocess(mean=(0.0,), std=(1.0,), crop_padding=2, flip=True)
JPEG = Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, image_size=16, shear_deg=10, zoom=0.2, flip=True)


@pytest.fixture(params=["dali-array", "dali-stream", "dali-jpeg", "baseline-array"])
def build(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """build(share, batch_size): a training loader over noise that is as bright as the image's number says."""
    kind = request.param
    common = {"train": True, "seed": 3, "device": torch.device("cpu"), "dtype": torch.float32}
    noise = np.random.default_rng(0).integers(0, GREY, (N, 12, 12, 1), np.uint8)
    images = noise + (GREY * np.arange(N, dtype=np.uint8))[:, None, None, None]
    if kind == "dali-jpeg":
        files = [tmp_path / f"{number:02}.jpg" for number in range(N)]
        for file, image in zip(files, images, strict=True):
            Image.fromarray(image[:, :, 0]).resize((24, 20)).convert("RGB").save(file)
        return lambda share, batch_size: dali.jpeg_loader(
            files, np.arange(N), preprocess=JPEG, share=share, batch_size=batch_size, **common
        )
    if kind == "dali-stream":
        monkeypatch.setattr(dali, "RESIDENT_BYTES", 0)
        monkeypatch.setattr(dali, "SUPER_BATCH_IMAGES", 8)
    make: Any = partial(baseline.array_loader, workers=0) if kind == "baseline-array" else dali.array_loader
    return lambda share, batch_size: make(
        images, np.arange(N), preprocess=ARRAY, share=share, batch_size=batch_size, **common
    )


def epochs(loader: Loader, count: int = 2) -> list[list[tuple[torch.Tensor, list[int]]]]:
    """Images and labels of each batch."""
    found = [[(batch.images.clone(), batch.labels.tolist()) for batch in loader.epoch()] for _ in range(count)]
    loader.close()
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_see_together_what_one_sees(build: Any, request: pytest.FixtureRequest, ranks: int) -> None:
    """Each batch of 12, at the same place in the same order, no image lost or twice, and with DALI moved alike."""
    whole = epochs(build(Share(), 12))
    parts = [epochs(build(Share(rank, ranks), 12 // ranks)) for rank in range(ranks)]
    assert whole[0][0][1] != whole[1][0][1]
    for epoch, batches in enumerate(whole):
        assert len(batches) == N // 12
        assert {len(part[epoch]) for part in parts} == {N // 12}
        seen = [label for _, labels in batches for label in labels]
        assert len({*seen}) == len(seen) == 36
        for number, (images, labels) in enumerate(batches):
            together: list[Any] = [None] * 12
            for rank, part in enumerate(parts):
                own_images, own_labels = part[epoch][number]
                for place, pair in enumerate(zip(own_images, own_labels, strict=True)):
                    together[rank + ranks * place] = pair
            assert [label for _, label in together] == labels
            if "dali" in request.node.callspec.id:
                assert torch.equal(torch.stack([image for image, _ in together]), images)


def test_epochs_that_come_as_one_are_all_there(build: Any, request: pytest.FixtureRequest) -> None:
    """Of 43 images two ranks with batches of 12 see 72: all once, and then 29 of them, none twice.

    With DALI they are the epochs of one rank that has them one by one, moved alike.
    """
    parts = [epochs(build(Share(rank, 2, 2), 12)) for rank in range(2)]
    singles = epochs(build(Share(), N), 4)
    for number in range(2):
        assert [len(part[number]) for part in parts] == [N // 12, N // 12]
        rows = [[pair for batch in part[number] for pair in zip(*batch, strict=True)] for part in parts]
        seen = [pair for both in zip(*rows, strict=True) for pair in both]
        labels = [label for _, label in seen]
        assert sorted(labels[:N]) == [*range(N)]
        assert len({*labels[N:]}) == len(labels) - N == 29
        assert labels[:29] != labels[N:]
        if "dali" in request.node.callspec.id:
            single = [
                pair for epoch in singles[2 * number :][:2] for batch in epoch for pair in zip(*batch, strict=True)
            ]
            assert labels == [label for _, label in single][: len(labels)]
            assert all(torch.equal(image, other) for (image, _), (other, _) in zip(seen, single, strict=False))


def test_ranks_of_the_baseline_move_images_differently() -> None:
    image = np.random.default_rng(0).integers(0, 255, (1, 12, 12, 1), np.uint8).repeat(16, axis=0)
    looks = []
    for rank in (0, 1, 0):
        loader = baseline.array_loader(
            image,
            None,
            preprocess=ARRAY,
            batch_size=8,
            train=True,
            seed=0,
            device=torch.device("cpu"),
            dtype=torch.float32,
            workers=0,
            share=Share(rank, 2),
        )
        looks.append(epochs(loader, 1)[0][0][0])
    assert not torch.equal(looks[0], looks[1])
    assert torch.equal(looks[0], looks[2])


def test_every_rank_has_as_many_batches() -> None:
    """15 images fill no batch of 2 × 8, though the first rank's half would fill one of 8."""
    assert count_epoch(16, 8, train=True, share=Share(0, 2)) == (1, 8)
    with pytest.raises(UserError, match="15 images do not fill one batch of 16"):
        count_epoch(15, 8, train=True, share=Share(0, 2))
    with pytest.raises(UserError, match="7 images do not fill one batch of 8"):
        count_epoch(7, 8, train=True, share=Share(0, 2, 2))


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_of_any_number_of_ranks_each_has_the_batches_of_one(ranks: int) -> None:
    assert count_epoch(800, 128, train=True, share=Share(0, ranks, ranks)) == (6, 6 * 128)


# Recipes


def case_of(workload: str, **changes: Any) -> Case:
    return Case(workload=workload, **({"suite": "full", "tuning": "tuned", "gpus": 4} | changes))


def test_weak_scaling_gives_each_the_work_of_one() -> None:
    for name in ("cifar10-cnn", "cifar100-cnn"):  # SGD and Adam
        one, many = find(name).recipe, resolve(case_of(name)).recipe
        assert many == replace(one, batch_size=4 * one.batch_size, epochs=4 * one.epochs, evaluate_every=4)
        assert many.evaluations == one.epochs


def test_strong_scaling_leaves_the_recipe() -> None:
    assert resolve(case_of("cifar10-cnn", scaling="strong")) == find("cifar10-cnn")
    with pytest.raises(UserError, match="a batch of 2048 cannot be shared out to 3 GPUs"):
        resolve(case_of("cifar10-cnn", scaling="strong", gpus=3))


def test_the_open_division_is_refused() -> None:
    with pytest.raises(UserError, match="cifar10-94 is of the open division, which runs on one GPU"):
        resolve(case_of("cifar10-94", suite="open"))


def test_a_case_says_how_many() -> None:
    assert str(case_of("dcgan")) == "dcgan tuned e2e 4 GPUs weak seed 0"


# Training


COURSE = """
import sys, time
from dataclasses import replace
from pathlib import Path
import torch

torch.set_default_dtype(torch.float64)  # in fp32 these networks make a difference of 1e-7 one of 1e-4 in twenty steps
from netdyno.bench import child, parallel
from netdyno.bench.order import Order
from netdyno.bench.tuning import TUNINGS, fp32
from netdyno.bench.workloads import Case, resolve

workload, root, gpus = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
if gpus > 1:
    parallel.see_own_gpu()
torch.set_num_threads(1)
few = {"batch_size": 32, "epochs": 2, "train_images": 330, "eval_images": 51}

child.resolve = lambda case: replace(resolve(case), recipe=replace(resolve(case).recipe, **few))
build = child.build

def build_exact(workload, classes):
    workload, network = build(workload, classes)
    network.register_forward_pre_hook(lambda network, inputs: (inputs[0].double(),))
    return workload, network

child.build = build_exact
parallel.sent_as = lambda gradient, half: gradient.dtype
child.communication = lambda *_: None
child.warm_up = lambda step: bool(torch.isfinite(step()).all())
TUNINGS["fp32"] = lambda capability: replace(fp32(capability), compile=False)
row = child.curve_row

def exact_row(epoch, train_s, eval_s, loss, evaluation):
    print(loss, evaluation.metric, evaluation.images)
    return row(epoch, train_s, eval_s, loss, evaluation)

child.curve_row = exact_row
case = Case(workload=workload, suite="quick", tuning="fp32", gpus=gpus, scaling="strong")
child.run(Order(case=case, data=root, pictures=root, started=time.time()), lambda **event: None)
"""


def course(workload: str, root: Path, gpus: int) -> list[float]:
    """Loss, metric and images of each of two epochs, alike in all ranks."""
    said = in_ranks(COURSE, workload, str(root), str(gpus), count=gpus)
    assert {*said} == {said[0]}
    return [float(number) for number in said[0].split()]


def follows(workload: str, root: Path) -> None:
    synthetic.make("cifar10", root, sizes=(340, 60))
    with ThreadPoolExecutor() as both:
        one, two = both.map(partial(course, workload, root), (1, 2))
    assert len(one) == 6
    assert one[2] == two[2] == 51
    assert two == pytest.approx(one, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["cifar10-cnn", "conv-autoencoder"])
def test_two_ranks_follow_the_loss_of_one(workload: str, tmp_path: Path) -> None:
    """Under strong scaling, in fp64: with crops and mirroring, and with another basis."""
    follows(workload, tmp_path)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("workload", ["cifar10-cnn", "conv-autoencoder"])
def test_two_gpus_follow_the_loss_of_one(workload: str, tmp_path: Path) -> None:
    """Their sums are part of the captured step."""
    follows(workload, tmp_path)


# Records


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a case on small stand-ins; returns its record, as it was read again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(case: Case, listen: Any = lambda event: None, **options: Any) -> dict[str, Any]:
        name = find(case.workload).dataset
        if not (tmp_path / "data").exists():
            synthetic.make(name, tmp_path / "data", sizes=(1_300 if name == "anime_faces" else 600, 100))
        here = machine.describe()
        runner.run(case, data=tmp_path / "data", results=tmp_path / "results", machine=here, listen=listen, **options)
        records, problems = schema.read_all(tmp_path / "results")
        assert problems == []
        return records[-1]

    return run


@pytest.mark.slow
def test_a_record_of_two_ranks(run: Any) -> None:
    record = run(EAGER)
    assert (record["status"], record["reason"]) == ("ok", None)
    case, timing, found = record["case"], record["timing"], record["communication"]
    assert (case["gpus"], case["scaling"], case["recipe"]["batch_size"]) == (2, "weak", 256)
    assert set(found) == documented()["communication"]
    assert timing["steps"] == 8  # twice two epochs, in whose 1,200 images are four batches of 256
    assert len(found["rank_train_s"]) == 2
    assert max(found["rank_train_s"]) == timing["train_s"]
    assert record["throughput"]["images_per_s"] == pytest.approx(8 * 256 / timing["train_s"], rel=1e-3)
    rounded = 1e-4 * (found["step_s"] + found["apart_step_s"])  # half of the fifth digit of each, at most
    assert found["exposed_s"] == pytest.approx(found["step_s"] - found["apart_step_s"], rel=1e-4, abs=rounded / 2)
    assert 0 < found["add_up_s"] < found["step_s"]
    assert found["add_up_mib"] == pytest.approx(4 * 159_254 / 2**20, rel=1e-3)  # the network's weights, in fp32
    assert [row["epoch"] for row in record["accuracy"]["curve"]] == [2, 4]


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize(
    "case",
    [
        case_of("mnist-cnn", suite="quick", gpus=2, tuning="t4", mode="compute"),  # the gradient scaler
        case_of("dcgan", suite="quick", gpus=2),  # two players
    ],
    ids=str,
)
def test_captured_steps_of_two_gpus(run: Any, case: Case) -> None:
    record = run(case)
    assert (record["status"], record["reason"]) == ("ok", None)
    assert record["case"]["captured"]
    assert record["compile"]["recompiles"] == 0
    assert len(record["gpu"]["cards"]) == len({*record["gpu"]["fingerprints"]}) == 2
    assert record["memory"]["nvml_process_peak_mib"] > 0
    one, two, *_ = Gpu.cards()
    with Gpu.open(one) as card:
        share = case.workload == "dcgan" and card is not None and card.reaches(two)
    assert record["communication"]["shared_mib"] == (record["communication"]["add_up_mib"] if share else 0)


@pytest.mark.slow
def test_torchrun_starts_the_command(tmp_path: Path) -> None:
    """Two processes, of which one goes on and makes one record."""
    synthetic.make("mnist", tmp_path / "data", sizes=(600, 100))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "netdyno.bench", "run", "mnist-cnn", "--tuning", "eager", "--mode", "compute"]
    command += ["--data", str(tmp_path / "data"), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    [record] = load_all(tmp_path / "results")
    assert (record["status"], record["case"]["gpus"]) == ("ok", 2)


@pytest.mark.parametrize(
    ("environment", "asked", "ends"),
    [
        ({}, None, 1),
        ({}, 3, 3),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, None, 2),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 2, 2),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 4, "--gpus 4, but torchrun started 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None, "torchrun on several machines"),
    ],
)
def test_how_many_gpus(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], asked: int | None, ends: int | str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    if isinstance(ends, int):
        assert cli.ranks_of_torchrun(asked) == ends
    else:
        with pytest.raises(UserError, match=ends):
            cli.ranks_of_torchrun(asked)


@pytest.mark.parametrize(
    ("visible", "rank", "own"), [(None, 1, "1"), ("4,GPU-a,6", 1, "GPU-a"), ("", 0, ""), ("3", 1, "")]
)
def test_a_rank_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch, visible: str | None, rank: int, own: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    parallel.see_own_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


# How ranks end


def failure(exitcode: int, seen: float, **told: Any) -> Any:
    name = signal.Signals(-exitcode).name if exitcode < 0 else ""
    return SimpleNamespace(
        exitcode=exitcode, timestamp=int(seen), error_file_data=told, signal_name=lambda: name, pid=0
    )


@pytest.mark.parametrize(
    ("failures", "status", "reason"),
    [
        ({0: failure(-15, 9.0), 1: failure(-9, 9.9)}, "failed", "rank 1 was ended by SIGKILL"),
        (
            {0: failure(-15, 9.0), 1: failure(1, 9.9, timestamp=9.9, event={"status": "failed", "reason": "no"})},
            "failed",
            "rank 1: no",
        ),
        (
            {
                0: failure(1, 5.7, timestamp=5.7, event={"status": "failed", "reason": "peer is gone"}),
                1: failure(1, 5.2, timestamp=5.2, event={"status": "oom", "reason": "full"}),
            },
            "oom",
            "rank 1: full",
        ),
        (
            {0: failure(1, 5.0, timestamp=5.0, event={"status": "failed", "reason": "gone"}), 1: failure(-11, 6.0)},
            "failed",
            "rank 1 was ended by SIGSEGV",
        ),
        ({0: failure(3, 5.0)}, "failed", "rank 0 ended with exit code 3"),
    ],
)
def test_the_first_failure_is_told(failures: dict[int, Any], status: str, reason: str) -> None:
    event = parallel._cause(failures)
    assert (event["status"], event["reason"]) == (status, reason)


@pytest.mark.slow
def test_the_error_of_a_rank_is_the_records(run: Any, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    path = synthetic.make("mnist", tmp_path / "data", sizes=(300, 100)) / "train.images.npy"
    path.write_bytes(path.read_bytes()[:-1_000])
    begun = time.monotonic()
    record = run(EAGER, events.append)
    assert time.monotonic() - begun < 60
    assert record["status"] == "failed"
    assert "train.images.npy is truncated" in record["reason"]
    assert record["reason"].startswith("rank ")
    assert events[-1]["user_error"] is True


@pytest.mark.slow
def test_ranks_start_again_where_asked_to(run: Any) -> None:
    """After one of them was killed in training; what was measured before does not count."""
    pids: list[int] = []

    def kill(event: dict[str, Any]) -> None:
        if "pids" in event:
            pids.extend(event["pids"])
        if event.get("timed") and len(pids) == 2:
            os.kill(pids[1], signal.SIGKILL)

    record = run(EAGER, kill, restarts=1)
    assert (record["status"], record["reason"]) == ("ok", None)
    assert len({*pids}) == 4
    assert record["communication"]["restarts"] == 1
    assert record["timing"]["steps"] == 8
