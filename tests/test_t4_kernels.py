"""Every Triton kernel that torch.compile made of the six networks compiles for a T4 (sm_75), without a GPU.

As they were when t4_kernels.json was collected; what a network has changed since is not in it.
"""

from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
import t4_kernels
from t4_kernels import Kernel

from netdyno.bench.workloads import names

SHARED = 64 * 1024  # bytes that a block may have on Turing
AT_ONCE = 2


class Compiled(NamedTuple):
    """What matters of one kernel in one of inductor's configurations."""

    name: str
    shared: int
    bf16: bool


def compile_all(kernels: list[Kernel], folder: Path) -> list[Compiled]:
    """Each in every configuration that inductor would try on a T4."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = []
    for kernel in kernels:
        tuner = kernel.load(folder)
        for config in tuner.configs:
            meta = tuner._create_compile_meta(config)
            source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            options = tuner._create_compile_options(config, meta)
            made = triton.compile(source, target=GPUTarget("cuda", 75, 32), options=options)
            # before it becomes PTX, where Turing's bf16 is integers that are shifted
            found.append(Compiled(kernel.name, made.metadata.shared, "bf16" in made.asm["ttir"]))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_they_compile_with_the_memory_and_the_types_of_turing(tmp_path: Path) -> None:
    kernels, made_on = t4_kernels.kept()
    assert {name: made_on[name] for name in t4_kernels.MADE_BY} == {
        name: version(name) for name in t4_kernels.MADE_BY
    }, "collect them anew: python tests/t4_kernels.py"
    assert {network for kernel in kernels for network in kernel.networks} == set(names())
    parts = [kernels[start::AT_ONCE] for start in range(AT_ONCE)]
    with ProcessPoolExecutor(AT_ONCE, mp_context=get_context("spawn")) as pool:
        compiled = [one for part in pool.map(compile_all, parts, [tmp_path] * AT_ONCE) for one in part]
    assert {one.name for one in compiled} == {kernel.name for kernel in kernels}
    assert [one.name for one in compiled if one.bf16] == []
    assert [one.name for one in compiled if one.shared > SHARED] == []
    print(f"{len(kernels)} kernels of torch.compile in {len(compiled)} configurations compile for sm_75")


def test_a_kernel_that_is_not_of_turing_is_seen(tmp_path: Path) -> None:
    """The check itself: one of the kernels, of other types."""
    kernel = next(kernel for kernel in t4_kernels.kept()[0] if "*fp16" in kernel.source)
    spoilt = kernel._replace(source=kernel.source.replace("*fp16", "*bf16"))
    assert any(one.bf16 for one in compile_all([spoilt], tmp_path))
