"""What cards sustain: numbers from others' measurements and, for the H200, our own. No torch in here.

`peak` is the datasheet's (dense, without sparsity); `rate` is what a large matrix product or copy reaches for seconds.
Sources, by the names that the comments use:

    datasheet   NVIDIA's datasheet of the card; of the A10G, which has none, AWS's page on G5 and NVIDIA's on the A10
    ours        measured on an H200 by the rules of bench/ceilings.py: 788 TFLOP/s bf16, copies at 4.3 TB/s
    forum       NVIDIA developer forum, thread 264462 (T4, cuBLAS, 4,096 × 4,096: 24 TFLOP/s, held down by its 70 W)
    MAMF        stas00/ml-engineering, Maximum Achievable Matmul FLOPS (A100 SXM 271.2, H100 SXM 794.5)
    torch-perf  zzc0721/torch-performance-test-data, 8,192 × 8,192: issues 79 (H100), 120 (L4), 126 (A10G), 140 (V100)
    devices     chsasank/device-benchmarks: fp32 products and copies (T4, A10, A100 80 GB, V100)
    mli         mli/transformers-benchmarks, its table and issue 4 (A800 80 GB PCIe: 1,727 of 1,935 GB/s)
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rate:
    peak: float
    rate: float


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card; `half` is bf16 or fp16 on tensor cores, `single` fp32 without them."""

    name: str
    half_tflops: Rate
    single_tflops: Rate
    gb_per_s: Rate  # 10⁹ bytes a second, read plus written
    memory_mib: int  # as nvidia-smi shows it

    def flop_per_s(self, precision: str) -> float:
        return 1e12 * (self.single_tflops if precision == "fp32" else self.half_tflops).rate

    @property
    def bytes_per_s(self) -> float:
        return 1e9 * self.gb_per_s.rate


# How far sources disagree on one card, as the standard deviation of logarithms. V100, fp16: 84 (devices), 95 (mli), 97
# (torch-perf), 101 (forum 79781, PCIe): 0.08. A100: 230 (mli), 271 (MAMF): 0.12. H100: 736 in fp16, 797 in bf16
# (torch-perf), 794 (MAMF): 0.04. L4: 54 at 8,192, 69 at 2,048 (torch-perf): 0.17.
DISAGREEMENT = 0.1

CARDS = {
    "t4": Card(
        name="Tesla T4",
        half_tflops=Rate(peak=65, rate=24),  # datasheet; forum
        single_tflops=Rate(peak=8.1, rate=4.0),  # datasheet; devices
        gb_per_s=Rate(peak=320, rate=240),  # datasheet; devices
        memory_mib=15_360,
    ),
    "l4": Card(
        name="L4",
        half_tflops=Rate(peak=121, rate=53.8),  # datasheet; torch-perf
        single_tflops=Rate(peak=30.3, rate=10.7),  # datasheet; torch-perf
        gb_per_s=Rate(peak=300, rate=234),  # datasheet; the A10's share, 0.78 (the same kind of memory)
        memory_mib=23_034,
    ),
    "a10g": Card(
        name="A10G",
        half_tflops=Rate(peak=70, rate=65.7),  # datasheet; torch-perf
        single_tflops=Rate(peak=35, rate=23.2),  # datasheet; torch-perf
        gb_per_s=Rate(peak=600, rate=469),  # datasheet; devices (A10)
        memory_mib=23_028,
    ),
    "a100": Card(
        name="A100 SXM 80 GB",
        half_tflops=Rate(peak=312, rate=271),  # datasheet; MAMF
        single_tflops=Rate(peak=19.5, rate=19),  # datasheet; devices
        gb_per_s=Rate(peak=2039, rate=1815),  # datasheet; the A800's share, 0.89 (mli)
        memory_mib=81_920,
    ),
    "v100": Card(
        name="V100 SXM2 16 GB",
        half_tflops=Rate(peak=125, rate=97.4),  # datasheet; torch-perf
        single_tflops=Rate(peak=15.7, rate=14.4),  # datasheet; torch-perf
        gb_per_s=Rate(peak=900, rate=766),  # datasheet; devices (V100 32 GB)
        memory_mib=16_384,
    ),
    "h100": Card(
        name="H100 SXM",
        half_tflops=Rate(peak=989, rate=794),  # datasheet; MAMF
        single_tflops=Rate(peak=67, rate=51.8),  # datasheet; torch-perf
        gb_per_s=Rate(peak=3350, rate=3000),  # datasheet; the H200's share, 0.9
        memory_mib=81_559,
    ),
    "h200": Card(
        name="H200",
        half_tflops=Rate(peak=989, rate=788),  # datasheet; ours
        single_tflops=Rate(peak=67, rate=51.8),  # datasheet; the H100's (the same chip)
        gb_per_s=Rate(peak=4800, rate=4300),  # datasheet; ours
        memory_mib=143_771,
    ),
}
