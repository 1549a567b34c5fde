"""Triton kernels where there is no GPU: run by its interpreter, and compiled."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def assert_equal_in_the_interpreter(file: str, *ignored: str) -> None:
    """Runs a test's file, which compares its kernels and prints "equal".

    In a process of its own: Triton decides for the interpreter when a kernel is defined. `ignored`: warnings that are
    no errors.
    """
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    warnings = [option for warning in ignored for option in ("-W", f"ignore:{warning}")]
    command = [sys.executable, "-W", "error", *warnings, file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


def compiled(
    kernel: Any, values: Mapping[str, Any], pointers: Mapping[str, str], capability: int, options: dict[str, int]
) -> Any:
    """`kernel` for a compute capability, as it is launched: all pointers are multiples of 16 bytes.

    values: its constants. pointers: what each points to, "bf16" say; all else are whole numbers.
    """
    signature = {
        name: "constexpr" if name in values else f"*{pointers[name]}" if name in pointers else "i32"
        for name in kernel.arg_names
    }
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
