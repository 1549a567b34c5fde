"""Data parallel: one process a GPU, a *rank*; what a rank knows of the others and what they do together.

Every rank trains its own copy of the network on its part of each global batch. In each backward pass the gradients are
added up over all ranks (`adding_up`), so that all copies take the same step. On GPUs that goes by NCCL and is part of
the captured step, on a CPU by gloo. With one rank there is no process group, and what these functions give is what they
got.

Sums are part of the backward graph, whose compiler starts each as soon as its gradients are there, computes what else
there is and waits for all at the end (`overlap`); uncompiled, they come after the backward pass. A gradient of at least
`LARGE` elements travels alone and, under mixed precision, in its 16-bit type: it came out of 16-bit kernels, and sums
are rounded. All smaller ones of a network travel in fp32, as one bucket. Networks whose weights are kept in 16 bits go
another way where the GPUs reach each other's memory: `sharded`.

What ranks do and do not share:

- *Weights* start as those of rank 0 and stay alike, since updates are.
- *Batch norm* normalises by the statistics of a rank's own part, as torch's DistributedDataParallel does. Its running
  averages are averaged over the ranks before each evaluation.
- *Order and augmentation* of the images come from the seed alone: as many ranks as one likes see, together, the global
  batches of one rank. Only the `DataLoader` of the baseline draws augmentation anew in each rank.
- *Noise and dropout* differ from rank to rank.
- *Evaluation* is shared out image by image and its sums are added up, as integers or in fp64. A distance between sets
  of images is no sum: each rank computes the whole one.
- *How often* something is done that the clock decides, such as steps of warm-up, is decided by the slowest rank's clock
  for all: a rank that did one step more would wait for the others for ever.
"""

import json
import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .reach import all_reach_all

PATIENCE = timedelta(minutes=30)  # for another rank; a run that falls silent is ended before
LARGE = 1 << 18  # elements of a weight or its gradient: 1 MiB in fp32

_apart = False  # while the ranks train each on its own
_reach: bool | None = None  # whether each rank's GPU reaches the memory of all others, once that was asked


def rank() -> int:
    """This rank's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cores() -> int:
    """CPU cores for this rank."""
    return max(1, len(os.sched_getaffinity(0)) // ranks())


def seed_of(seed: int) -> int:
    """The seed of what differs between ranks: `seed` itself in rank 0."""
    return seed if rank() == 0 else int(np.random.SeedSequence((seed, rank())).generate_state(1)[0])


def join(device: torch.device) -> None:
    """Makes this process one of the ranks that `launch` started. `device`: that of the tensors that they exchange."""
    store, number, count = next(dist.rendezvous("env://"))
    # The agent's store outlives the ranks that it starts again, and what those before them left there.
    store = dist.PrefixStore(f"attempt {restarts()}", store)
    common: dict[str, Any] = {"store": store, "rank": number, "world_size": count, "timeout": PATIENCE}
    if device.type == "cuda":
        urgent = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # sums do not queue behind convolutions
        here = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl", device_id=here, pg_options=urgent, **common)
    else:
        dist.init_process_group("gloo", **common)


def leave() -> None:
    """Waits until every rank has come here: nobody's memory goes while another may still use it."""
    if dist.is_initialized():
        dist.barrier()


def share(loss: Tensor) -> Tensor:
    """What this rank's mean loss contributes to that of the global batch, so that gradients only have to be added."""
    return loss if ranks() == 1 else loss / ranks()


def adding_up(network: nn.Module, half: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`network`, to be called in one loss: backward, the gradients of its weights become their sums over all ranks.

    half: the type of large gradients on their way, fp32 or that of mixed precision.
    """
    if ranks() == 1 or _apart:
        return network
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    weights = dict(zip(trained, _AddingUp.apply(half, *trained.values()), strict=True))
    return partial(torch.func.functional_call, network, weights)


def updates_are_shared() -> bool:
    """Whether weights in bf16 are updated by all ranks together (`sharded`); all of them ask at once."""
    global _reach
    if _apart or ranks() == 1:
        return False
    if _reach is None:
        _reach = dist.get_backend() == "nccl" and all_reach_all()
    return _reach


class _AddingUp(torch.autograd.Function):
    """Weights as they are; backward their gradients' sums."""

    @staticmethod
    def forward(ctx: Any, half: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.half, ctx.orders = half, [in_memory(weight) for weight in weights]
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *sums(gradients, ctx.orders, ctx.half)


def in_memory(tensor: Tensor) -> list[int]:
    """The dimensions of a tensor, from the one with the longest stride to that with the shortest.

    Of those with the same stride, of which all but one have one element, the longest comes first.
    """
    return sorted(range(tensor.ndim), key=lambda axis: (tensor.stride(axis), tensor.shape[axis]), reverse=True)


def flat(values: Tensor, order: Sequence[int]) -> Tensor:
    """[N] of values that have the dimensions of a weight, in the order in which the weight lies."""
    return values.permute([*order]).reshape(-1)


def as_it_lies(weight: nn.Parameter) -> Tensor:
    """[N], the same memory. RuntimeError if it has gaps."""
    return weight.data.permute(in_memory(weight)).view(-1)


def flat_gradient(weight: nn.Parameter) -> Tensor:
    """[N], the weight's gradient in the order in which the weight lies."""
    assert weight.grad is not None
    return flat(weight.grad, in_memory(weight))


def shaped(values: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """What `flat` was made of."""
    return values.view([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(order))])


def sums(gradients: Sequence[Tensor], orders: Sequence[list[int]], half: torch.dtype) -> list[Tensor]:
    """The sum over all ranks of each of the gradients, which are in the order of the forward pass.

    orders: the dimensions of each weight as they are `in_memory`. Sums lie so, too, and compiled gradients do, although
    a trace may show them otherwise. Asks nothing of the device and may be part of a CUDA graph.
    """
    assert dist.group.WORLD is not None
    group, found = dist.group.WORLD.group_name, list(gradients)
    started = []
    for bucket in buckets(gradients):
        rows = [flat(gradients[place], orders[place]) for place in bucket]
        row = (rows[0] if len(rows) == 1 else torch.cat(rows)).to(sent_as(gradients[bucket[0]], half))
        started.append((bucket, torch.ops._c10d_functional.all_reduce(row, "sum", group)))
    for bucket, sent in started:
        total = torch.ops._c10d_functional.wait_tensor(sent)
        for place, part in zip(bucket, total.split([gradients[place].numel() for place in bucket]), strict=True):
            found[place] = shaped(part, gradients[place].shape, orders[place]).to(gradients[place].dtype)
    return found


def buckets(gradients: Sequence[Tensor]) -> list[list[int]]:
    """Which of the gradients travel together, by their places, in the order in which a backward pass fills them.

    It goes from the last to the first, so that a bucket is full when the first of its gradients is there.
    """
    alone = [[place] for place, gradient in enumerate(gradients) if gradient.numel() >= LARGE]
    together = [place for place, gradient in enumerate(gradients) if gradient.numel() < LARGE]
    return sorted(filter(None, [*alone, together]), reverse=True)


def sent_as(gradient: Tensor, half: torch.dtype) -> torch.dtype:
    """The type in which a gradient is added up."""
    return half if gradient.numel() >= LARGE else torch.promote_types(gradient.dtype, torch.float32)


@contextmanager
def apart() -> Iterator[None]:
    """Gradients are not added up meanwhile: to see what a step costs without that, of one that is made meanwhile."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def total(sums: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(sums)
    return sums


def every(value: float) -> list[float]:
    """The `value` of each rank, in their order."""
    if ranks() == 1:
        return [value]
    own = torch.tensor([value], dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    found = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(found, own)
    return [one.item() for one in found]


def slowest(seconds: float) -> float:
    """The most of all ranks' `seconds`: the same number in each."""
    return max(every(seconds))


def meet() -> None:
    """Waits until all ranks are here: what one of them still prepares is no other's training time."""
    every(0.0)


def broadcast(network: nn.Module) -> None:
    """Weights and buffers of rank 0 for all."""
    if ranks() > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, src=0)


def average_statistics(network: nn.Module) -> None:
    """The running averages of batch norm, where it trains, become their mean over the ranks."""
    if ranks() == 1:
        return
    norms = [norm for norm in network.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training]
    own = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
    if own:
        mean = total(torch.cat(own)) / ranks()
        torch._foreach_copy_(own, list(mean.split([len(value) for value in own])))


# Start and end of the ranks of one host


def see_own_gpu() -> None:
    """Leaves a rank the one GPU that is its own, of those that were visible; before CUDA is used. A CPU sees none."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # each rank's is the first of those that it sees
    number, visible = int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = [str(number)] if visible is None else visible.split(",")[number : number + 1]
    os.environ["CUDA_VISIBLE_DEVICES"] = "".join(mine)


def launch(order: str, count: int, restarts: int) -> dict[str, Any] | None:
    """Runs an order by `count` ranks, under the agent of torchrun; returns when the last one is gone.

    Each is a `bench/start.py` with the order as its argument and this process's standard input and output. A rank that
    fails ends all of them; then all start again, at most `restarts` times. Returns the event that tells of the failure
    (as `bench/child.py` lists them), None without.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no host's name has to be known to anybody
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
    )
    try:
        elastic_launch(config, sys.executable)("-X", "faulthandler", "-m", f"{__package__}.start", order)
    except ChildFailedError as error:
        for failure in error.failures.values():  # what a rank that was killed leaves: its workers
            with suppress(ProcessLookupError):
                os.killpg(failure.pid, signal.SIGKILL)
        return _cause(error.failures)
    return None


def restarts() -> int:
    """How often the agent has started the ranks again so far."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def last_words(**event: Any) -> None:
    """Tells the agent why this rank fails, and ends it at once: the others wait for it."""
    told = {"message": event["reason"], "timestamp": time.time(), "event": event}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(told), encoding="utf-8")
    os._exit(1)


def _cause(failures: dict[int, Any]) -> dict[str, Any]:
    """The event for the first of several failures: the others fail since it is gone, or by the agent's SIGTERM."""

    def place(failed: int) -> tuple[bool, float]:
        failure = failures[failed]
        killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        return not killed, failure.error_file_data.get("timestamp", math.inf)

    first = min(failures, key=place)
    failure = failures[first]
    event = failure.error_file_data.get("event")
    if event is None:
        how = (
            f"was ended by {failure.signal_name()}"
            if failure.exitcode < 0
            else f"ended with exit code {failure.exitcode}"
        )
        return {"status": "failed", "reason": f"rank {first} {how}"}
    return event | {"reason": f"rank {first}: {event['reason']}"}
