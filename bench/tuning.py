"""How a workload is executed, and the policy that picks a precision for a GPU or a CPU. No torch in here."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

Capability = tuple[int, int] | None  # CUDA compute capability; None: a CPU


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One way to execute a workload. It never changes what is computed beyond rounding."""

    name: str
    precision: Literal["fp32", "bf16", "fp16"]
    channels_last: bool
    compile: bool
    fused_optimizer: bool
    capture: bool  # the whole step, and many of them at a time, as one CUDA graph
    # Those of `kernels/` that networks can use, in place of what torch.compile makes and cuDNN does; with them, what
    # they allow for: dcgan's discriminator judges both its batches at once, and large weights are kept in 16 bits.
    kernels: bool
    loader: Literal["dali", "torch"]
    deterministic: bool = False  # the same bits each time, on the same machine and from the same seed
    needs_gpu: bool = False
    memory_limit_mib: int | None = None  # the run counts as out of memory when the process peak (NVML) is above


# As Linux names it on x86 and on Arm. Vectors alone (avx512_bf16) do not do: on two cores of a Xeon without AMX
# mnist-cnn trained on 3,028 images/s in bf16 and 4,071 in fp32, cifar10-cnn on 667 and 1,005.
CPU_BF16 = {"amx_bf16", "bf16"}


def precision_for(capability: Capability) -> Literal["bf16", "fp16", "fp32"]:
    """On a GPU bf16 from sm_80 on, fp16 with a gradient scaler below; on a CPU bf16 where that is fast, else fp32.

    Decided by what the device has: torch also answers True where bf16 is emulated, on a CPU several times as slowly.
    """
    if capability is None:
        return "bf16" if CPU_BF16 & cpu_features() else "fp32"
    return "bf16" if capability >= (8, 0) else "fp16"


@cache
def cpu_features() -> set[str]:
    """What Linux says that the CPU can do; nothing elsewhere."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return set(found[1].split()) if found else set()


# The ladder: each rung is the one below it and one thing more.


def eager(capability: Capability) -> Tuning:
    """What people write first: eager fp32 and a `DataLoader`."""
    return Tuning(
        name="eager",
        precision="fp32",
        channels_last=False,
        compile=False,
        fused_optimizer=False,
        capture=False,
        kernels=False,
        loader="torch",
    )


def amp(capability: Capability) -> Tuning:
    """`eager` in mixed precision, but on a CPU without bf16."""
    return replace(eager(capability), name="amp", precision=precision_for(capability))


def channels_last(capability: Capability) -> Tuning:
    """`amp` with weights and images channels last, as tensor cores like them."""
    return replace(amp(capability), name="channels-last", channels_last=True)


def compiled(capability: Capability) -> Tuning:
    """`channels-last` as one compiled graph, with a fused optimizer."""
    return replace(channels_last(capability), name="compiled", compile=True, fused_optimizer=True)


def dali(capability: Capability) -> Tuning:
    """`compiled`, fed by DALI."""
    return replace(compiled(capability), name="dali", loader="dali")


def captured(capability: Capability) -> Tuning:
    """`dali`, and on a GPU captured."""
    return replace(dali(capability), name="captured", capture=capability is not None)


def tuned(capability: Capability) -> Tuning:
    """The default: `captured`, and on a GPU with the kernels."""
    return replace(captured(capability), name="tuned", kernels=capability is not None)


LADDER = ("eager", "amp", "channels-last", "compiled", "dali", "captured", "tuned")


def fp32(capability: Capability) -> Tuning:
    """`captured` without mixed precision: what AMP gains, and how the source recipes are run for their accuracy."""
    return replace(captured(capability), name="fp32", precision="fp32")


def t4(capability: Capability) -> Tuning:
    """The policy of a T4 (sm_75, 16 GB) on whatever GPU is there: fp16, gradient scaler, at most 14 GiB."""
    return replace(tuned((7, 5)), name="t4", needs_gpu=True, memory_limit_mib=14 * 1024)


def deterministic(capability: Capability) -> Tuning:
    """`tuned` by algorithms that give the same bits each time: what that costs, and runs that can be repeated."""
    return replace(tuned(capability), name="deterministic", deterministic=True)


TUNINGS: dict[str, Callable[[Capability], Tuning]] = {
    make(None).name: make
    for make in (tuned, captured, dali, compiled, channels_last, amp, eager, fp32, deterministic, t4)
}
