"""Counted work: one network by hand, the others by what is known of them; and what a record reached."""

from dataclasses import replace
from typing import Any

import pytest
from made_up_records import CPU, make

from netdyno.bench import schema
from netdyno.bench.cards import CARDS
from netdyno.bench.layers import layers
from netdyno.bench.roofline import (
    RESNET50_INFERENCE,
    RESNET50_TRAINING,
    STEPS,
    Work,
    achieved,
    forward,
    kernels,
    trained_weights,
    work,
)
from netdyno.bench.workloads import find, names

MNIST_FLOPS = {  # by hand, two for each multiply-add
    "conv1": 2 * 26 * 26 * 32 * 9,
    "conv2": 2 * 11 * 11 * 64 * 32 * 9,
    "conv3": 2 * 9 * 9 * 64 * 64 * 9,
    "linear1": 2 * 1024 * 100,
    "linear2": 2 * 100 * 10,
}
MNIST_ACTIVATIONS = 32 * 26 * 26 + 32 * 13 * 13 + 64 * 11 * 11 + 64 * 9 * 9 + 64 * 4 * 4 + 100 + 10
MNIST_WEIGHTS = 9 * 32 + 32 * 64 * 9 + 64 * 64 * 9 + 1024 * 100 + 100 * 10
# inputs and outputs, each after its pooling, of each layer; the first has no gradient of its inputs
MNIST_FUSED = 2 * (784 + 5408) + 3 * (5408 + 7744) + 3 * (7744 + 1024) + 3 * (1024 + 100) + 3 * (100 + 10)
CEILINGS = {"matmul_bf16_tflops": 800.0, "copy_gb_per_s": 4000.0}


def test_mnist_by_hand() -> None:
    assert work(STEPS["mnist-cnn"], "sgd") == Work(
        matrix_flops=3 * sum(MNIST_FLOPS.values()) - MNIST_FLOPS["conv1"],
        few_flops=0,
        layered_bytes=7 * 2 * MNIST_ACTIVATIONS,
        fused_bytes=2 * MNIST_FUSED,
        step_bytes=MNIST_WEIGHTS * (20 + 18),
    )


def test_only_the_layer_before_a_pooling_stores_less() -> None:
    """ResNet-50 has three equal last convolutions (512 → 2,048 channels, 7×7); the third one's output is averaged."""
    step = (forward("resnet50 features", folded=True),)
    table = layers("resnet50 features")
    unpooled = sum(layer.inputs + layer.outputs for layer in table if layer.multiplies)
    branches = sum(layer.outputs for layer in table if layer.op == "add")
    pooled = 64 * (112 * 112 - 56 * 56) + 2048 * (7 * 7 - 1)
    assert work(step, "sgd").fused_bytes == 2 * (unpooled + branches - pooled)


def test_fp32_moves_twice_the_bytes() -> None:
    half, single = work(STEPS["mnist-cnn"], "sgd"), work(STEPS["mnist-cnn"], "sgd", "fp32")
    assert single == replace(
        half,
        layered_bytes=2 * half.layered_bytes,
        fused_bytes=2 * half.fused_bytes,
        step_bytes=MNIST_WEIGHTS * (20 + 12),
    )


def test_a_gan_runs_its_generator_three_times_and_its_discriminator_eight() -> None:
    """In forward runs: 3 of the generator; 3 each on real and generated images, and 2 for the generator's loss. First
    layers lack their inputs' gradient, but for that loss."""
    generator, discriminator = layers("dcgan generator"), layers("dcgan discriminator")
    whole = 3 * sum(layer.flops for layer in generator) + 8 * sum(layer.flops for layer in discriminator)
    assert work(STEPS["dcgan"], "adam").flops == whole - generator[0].flops - 2 * discriminator[0].flops
    assert trained_weights(STEPS["dcgan"]) == sum(layer.weights for layer in (*generator, *discriminator))


def test_known_networks() -> None:
    """ResNet-50 v1.5 at 224×224: 4.09 G multiply-adds (torchvision); training takes three times that, nearly."""
    inference, training = work(RESNET50_INFERENCE, "sgd"), work(RESNET50_TRAINING, "sgd")
    assert inference.flops == pytest.approx(2 * 4.09e9, rel=1e-3)
    stem = layers("resnet50 features")[0].flops
    assert training.flops == 3 * inference.flops - stem
    assert trained_weights(RESNET50_TRAINING) == 25_557_032 - 53_120 - 1000  # parameters, less norms' and biases
    assert work(STEPS["conv-autoencoder"], "adam").matrix_flops == 0


@pytest.mark.parametrize(
    ("step", "optimizer", "layered", "fused"),
    [
        # images/s of an H200 without the update; mnist-cnn is bound by traffic, cifar10-cnn fused by arithmetic
        (STEPS["mnist-cnn"], "sgd", 7.47e6, 24.1e6),
        (STEPS["cifar10-cnn"], "sgd", 2.38e6, 3.40e6),
        (STEPS["cifar100-cnn"], "adam", 342e3, 342e3),
        (STEPS["conv-autoencoder"], "adam", 11.1e6, 11.1e6),
        (STEPS["dcgan"], "adam", 56.2e3, 56.2e3),
        (STEPS["dcgan-common"], "adam", 346e3, 346e3),
    ],
)
def test_limits_of_an_h200(step: Any, optimizer: str, layered: float, fused: float) -> None:
    counted = work(step, optimizer)
    found = [counted.images_per_s(CARDS["h200"], 10**9, fused=fusing) for fusing in (False, True)]
    assert found == [pytest.approx(layered, rel=0.01), pytest.approx(fused, rel=0.01)]


def test_every_workload_is_counted() -> None:
    for name in (*names(), "dcgan-common"):
        counted = work(STEPS[name], find(name).recipe.optimizer)
        assert counted.fused_bytes <= counted.layered_bytes
        assert counted.flops > 0


def test_kernels_hold_all_products() -> None:
    for step in (*STEPS.values(), RESNET50_TRAINING):
        counted, launched = work(step, "adam"), kernels(step, "adam")
        assert sum(kernel.flops for kernel in launched) == counted.flops
        assert {kernel.kind for kernel in launched} <= {"matrix", "few", "pass", "weights"}


def test_passes_by_hand() -> None:
    """MNIST, conv 1: ReLU and pooling in one pass when compiled, in two when not; forward, then back."""
    full, pooled = 32 * 26 * 26, 32 * 13 * 13
    compiled = [kernel.bytes for kernel in kernels(STEPS["mnist-cnn"], "sgd") if kernel.kind == "pass"]
    assert compiled[:2] == [2 * (full + pooled), 2 * (full + pooled + full)]
    eager = [kernel.bytes for kernel in kernels(STEPS["mnist-cnn"], "sgd", compiled=False) if kernel.kind == "pass"]
    assert eager[:4] == [2 * 2 * full, 2 * 3 * full, *compiled[:2]]


# A record


def trained(**changes: Any) -> dict[str, Any]:
    recipe = {"batch_size": 100, "epochs": 2, "optimizer": "sgd"}
    return make(1, **({"images_per_s": 1e6, "recipe": recipe} | changes))


def test_record_by_hand() -> None:
    flops = 3 * sum(MNIST_FLOPS.values()) - MNIST_FLOPS["conv1"]
    traffic = 14 * MNIST_ACTIVATIONS + MNIST_WEIGHTS * 38 / 100
    found = achieved(trained(), CEILINGS)
    assert found == {
        "flop_per_s": 1e6 * flops,
        "bytes_per_s": pytest.approx(1e6 * traffic),
        "ceiling_flop_per_s": 8e14,
        "ceiling_bytes_per_s": 4e12,
        "share": pytest.approx(1e6 * traffic / 4e12),  # which is more than flops / 8e14
    }
    assert list(schema.problems(trained() | {"roofline": found})) == []


def test_ceilings_are_those_of_the_precision() -> None:
    eager = achieved(trained(tuning="eager"), CEILINGS)
    assert eager is not None
    assert (eager["ceiling_flop_per_s"], eager["ceiling_bytes_per_s"], eager["share"]) == (None, 4e12, None)
    known = achieved(trained() | {"case": trained()["case"] | {"precision": "fp16"}}, CEILINGS)
    assert known is not None
    assert known["ceiling_flop_per_s"] is None
    without = achieved(trained(), None)
    assert without is not None
    assert without["flop_per_s"]
    assert without["share"] is None
    assert list(schema.problems(trained() | {"roofline": without})) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "loader"},
        {"division": "open"},
        {"workload": "of-somebody-else"},
        {"throughput": None},
        {"recipe": {"batch_size": 100}},
    ],
)
def test_nothing_to_say(changes: dict[str, Any]) -> None:
    assert achieved(trained(**changes), CEILINGS) is None


def test_each_gpu_brings_its_ceilings() -> None:
    one = achieved(trained(), CEILINGS)
    recipe = {"batch_size": 200, "epochs": 2, "optimizer": "sgd"}  # 100 on each
    two = achieved(trained(images_per_s=2e6, recipe=recipe, gpus=2), CEILINGS)
    shared = achieved(trained(recipe=recipe, gpus=2, machine=CPU), CEILINGS)  # two processes on one CPU
    assert one is not None
    assert two is not None
    assert shared is not None
    assert two["share"] == pytest.approx(one["share"])
    assert two["ceiling_flop_per_s"] == 2 * 8e14
    assert two["bytes_per_s"] == pytest.approx(2 * one["bytes_per_s"])
    assert shared["share"] == pytest.approx(one["share"])
    assert shared["ceiling_bytes_per_s"] == 4e12
