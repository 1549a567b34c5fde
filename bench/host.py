"""What a loader costs one core of a host. No torch in here.

Measured on one core and carried over to another by single-core scores that others published. Scores are medians over
machines in SpareCores/sc-inspector-data, commit 804d3c7: Geekbench 6, `Single-Core Performance`, and PassMark's
`CPU_SINGLETHREAD`.
"""

import math
from dataclasses import dataclass
from statistics import fmean

# Processor seconds that Keras's ImageDataGenerator takes for an image: rescale, shear_range 0.2, zoom_range 0.2,
# horizontal_flip, flow_from_directory to 224×224 in batches of 32, as in the source notebook. On one core of
# MEASURED_ON at 4.0 GHz, pinned, in one thread, on 800 flowers of 240×320 (16 kB each): twelve runs of 100 batches, six
# with Keras 3.15 (scipy 1.17, Pillow 13), six with keras-preprocessing 1.1.2 (scipy 1.10, Pillow 9.4). Their medians
# are 4.65 to 4.97 ms, with a standard deviation of 2 %. Other work ran meanwhile, load 2 to 3 on two cores, so it is
# the process's own time, not the clock's; at load 5 it was 5.2 ms. One image by itself: read, decode and resize 0.5 ms,
# to an array 0.1, affine transform of three channels 3.9, flip and rescale 0.03; the rest is the batch.
KERAS_S = 4.87e-3


@dataclass(frozen=True, kw_only=True)
class Core:
    """A core by what one thread of it scores, the others idle."""

    name: str
    geekbench: float
    passmark: float

    def ratios(self, other: "Core") -> tuple[float, float]:
        """How many times as long as `other` it takes, by each of the scores."""
        return other.geekbench / self.geekbench, other.passmark / self.passmark


# 12 machines of AWS, {c,m,r}8i[d].{large,xlarge}. By its instructions, caches and clock the core of KERAS_S is such a
# one; its name was hidden.
MEASURED_ON = Core(name="Granite Rapids, 6975P-C", geekbench=2163, passmark=3250)
# Google attaches T4s to N1 machines only, and Colab's two CPUs are the two threads of one core (lscpu in notebooks:
# 2.0, 2.2 GHz), of whichever generation. n1-{standard,highcpu,highmem} of up to 16 vCPUs, 12 Haswells and 1 Broadwell;
# and the 4 n1 of 96, since no smaller one was a Skylake. E2s are left out: they share their cores with others.
COLAB_T4 = (
    Core(name="N1 Haswell, 2.3 GHz", geekbench=924, passmark=1635),
    Core(name="N1 Broadwell, 2.2 GHz", geekbench=951, passmark=1624),
    Core(name="N1 Skylake, 2.0 GHz", geekbench=1055, passmark=1584),
)


def slowdown(cores: tuple[Core, ...] = COLAB_T4, than: Core = MEASURED_ON) -> float:
    """How many times as long as `than` they take: the geometric mean over cores and scores."""
    return math.exp(fmean(math.log(ratio) for core in cores for ratio in core.ratios(than)))


def keras_on_colab_s() -> float:
    """Seconds an image of the source notebook's loader: one thread (fit's default is one worker), alone on its core.

    That the step is launched from the core's other thread, and under the same GIL, is not in it.
    """
    return KERAS_S * slowdown()
