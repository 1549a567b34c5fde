"""How a workload is executed, and the policy that picks a precision for a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    kernels: bool  # those of `kernels/` that networks can use, in place of what torch.compile makes and cuDNN does
    loader: Literal["dali", "torch"]
    needs_gpu: bool = False
    memory_limit_mib: int | None = None  # the run counts as out of memory when the process peak (NVML) is above


def precision_for(capability: Capability) -> Literal["bf16", "fp16"]:
    """bf16 on CPUs and from sm_80 on, fp16 with a gradient scaler below.

    Decided by capability: `torch.cuda.is_bf16_supported()` also answers True where bf16 is emulated.
    """
    return "bf16" if capability is None or capability >= (8, 0) else "fp16"


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
    """`eager` in mixed precision."""
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


TUNINGS: dict[str, Callable[[Capability], Tuning]] = {
    make(None).name: make for make in (tuned, captured, dali, compiled, channels_last, amp, eager, fp32, t4)
}
