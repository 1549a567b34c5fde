"""The tuning `deterministic`: the same bits from the same seed, in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from netdyno.bench.data import synthetic
from netdyno.bench.workloads import find, names

SCRIPT = """
import sys, time
from dataclasses import replace
from pathlib import Path
from netdyno.bench import child
from netdyno.bench.order import Order
from netdyno.bench.workloads import Case, resolve

workload, root, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
few = {"batch_size": 32, "epochs": 2, "train_images": 96, "eval_images": 64}
child.resolve = lambda case: replace(resolve(case), recipe=replace(resolve(case).recipe, **few))
row = child.curve_row

def exact_row(epoch, train_s, eval_s, loss, evaluation):
    print(epoch, loss.hex(), evaluation.metric.hex())
    return row(epoch, train_s, eval_s, loss, evaluation)

child.curve_row = exact_row
case = Case(workload=workload, suite="full", tuning="deterministic", seed=seed)
child.run(Order(case=case, data=root, pictures=root, started=time.time()), lambda **event: None)
"""


def runs(workload: str, folder: Path) -> list[str]:
    """Loss and metric of each of two epochs, to the last bit, by three fresh processes, the last from another seed."""
    synthetic.make(find(workload).dataset, folder, sizes=(1096, 64))  # of faces 1,000 are held out
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    said = []
    for seed in ("0", "0", "1"):
        command = [sys.executable, "-c", SCRIPT, workload, str(folder), seed]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    return said


@pytest.mark.slow
def test_a_run_repeats_to_the_last_bit(tmp_path: Path) -> None:
    """A network with crops, mirroring and dropout."""
    one, again, other = runs("cifar100-cnn", tmp_path)
    assert len(one.split()) == 6
    assert one == again
    assert one != other


@pytest.mark.gpu
@pytest.mark.parametrize("workload", names())
def test_a_run_repeats_to_the_last_bit_on_a_gpu(workload: str, tmp_path: Path) -> None:
    one, again, other = runs(workload, tmp_path)
    assert one == again
    assert one != other
