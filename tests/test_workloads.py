"""The specs: published numbers, suites, and that they are pure, frozen values."""

import json
import os
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from statistics import median

import pytest

from netdyno.bench.errors import UserError
from netdyno.bench.record import load_all
from netdyno.bench.workloads import (
    OPEN,
    SUITES,
    WORKLOADS,
    Case,
    OpenRecipe,
    Preprocess,
    Recipe,
    Workload,
    describe,
    find,
    names,
    resolve,
)

SIX = ["mnist-cnn", "cifar10-cnn", "cifar100-cnn", "conv-autoencoder", "dcgan", "resnet50-transfer"]
COLOURLESS = Preprocess(mean=(0.0,), std=(1.0,))

each = pytest.mark.parametrize("make", WORKLOADS, ids=SIX)


def test_the_six_of_the_design_under_unique_names() -> None:
    assert names() == SIX


@pytest.mark.parametrize("name", SIX)
def test_find_gives_the_workload_of_that_name(name: str) -> None:
    assert find(name).name == name


def test_an_unknown_workload_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as error:
        find("mnist")
    assert "'mnist'" in str(error.value)
    assert "\n" not in str(error.value)
    for name in SIX:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "optimizer", "learning_rate", "momentum", "batch_size", "epochs"),
    [
        ("mnist-cnn", "sgd", 0.01, 0.9, 32, 10),
        ("cifar10-cnn", "sgd", 0.001, 0.9, 64, 100),
        ("cifar100-cnn", "rmsprop", 1e-4, 0.0, 64, 200),
        ("conv-autoencoder", "adam", 1e-3, 0.9, 32, 100),
        ("dcgan", "adam", 2e-4, 0.5, 128, 70),
        ("resnet50-transfer", "adam", 1e-3, 0.9, 32, 50),
    ],
)
def test_source_recipes_have_the_published_numbers(
    name: str, optimizer: str, learning_rate: float, momentum: float, batch_size: int, epochs: int
) -> None:
    recipe = resolve(Case(workload=name, suite="source", tuning="tuned")).recipe
    assert (recipe.optimizer, recipe.learning_rate, recipe.momentum) == (optimizer, learning_rate, momentum)
    assert (recipe.batch_size, recipe.epochs) == (batch_size, epochs)
    assert (recipe.schedule, recipe.weight_decay) == ("constant", 0.0)
    assert (recipe.train_images, recipe.eval_images) == (None, None)


def test_data_metrics_and_targets_of_the_design() -> None:
    found = {workload.name: workload for workload in map(find, SIX)}
    assert [workload.dataset for workload in found.values()] == (
        ["mnist", "cifar10", "cifar100", "cifar10", "anime_faces", "flowers"]
    )
    assert [workload.metric.name for workload in found.values()] == (
        ["test accuracy", "test accuracy", "test accuracy", "PSNR", "SWD", "test accuracy"]
    )
    assert [workload.name for workload in found.values() if not workload.metric.higher_is_better] == ["dcgan"]
    assert found["mnist-cnn"].target == 99.0
    assert found["cifar100-cnn"].target == 56.0
    assert found["conv-autoencoder"].also_at_least == {"ssim": 0.96}
    assert found["dcgan"].target_share == 0.25
    assert found["resnet50-transfer"].target == 89.05
    assert {workload.division for workload in found.values()} == {"closed"}


def test_the_common_form_of_dcgan_runs_only_where_it_is_named() -> None:
    found = find("dcgan-common")
    assert found.name not in names()
    assert (found.target, found.target_share) == (None, None)
    assert (found.source.batch_size, found.recipe.batch_size) == (64, 128)
    by_name = {name: tuple(weight.shape) for name, weight in found.network().named_parameters()}
    assert by_name["generator.project.weight"] == (64 * 8 * 4 * 4, 100)
    assert by_name["generator.layers.11.weight"] == (64, 3, 4, 4)
    assert by_name["discriminator.layers.0.weight"] == (64, 3, 4, 4)
    assert by_name["discriminator.layers.11.weight"] == (1, 512, 4, 4)


@pytest.mark.parametrize("name", ["cifar10-cnn", "conv-autoencoder"])
def test_targets_are_the_medians_of_the_source_recipe(name: str) -> None:
    """Of five seeds, as the committed records have them."""
    recorded = load_all(Path(__file__).parent.parent / "results")
    runs = [run for run in recorded if (run["case"]["workload"], run["case"]["suite"]) == (name, "source")]
    assert sorted(run["case"]["seed"] for run in runs) == [0, 1, 2, 3, 4]
    assert {(run["status"], run["data"]["synthetic"]) for run in runs} == {("ok", False)}
    case = Case(workload=name, suite="source", tuning="fp32")
    recipe = json.loads(json.dumps(describe(case, resolve(case))["recipe"]))
    for run in runs:  # settings that came later are at their defaults
        assert run["case"]["recipe"] == {key: recipe[key] for key in run["case"]["recipe"]}
    assert find(name).target == median(run["accuracy"]["final"] for run in runs)
    assert SUITES["source"](find(name)).target is None


@each
def test_quick_takes_enough_steps_and_has_no_target(make: Callable[[], Workload]) -> None:
    quick = SUITES["quick"](make())
    recipe = quick.recipe
    assert recipe.train_images is not None
    assert recipe.eval_images is not None
    assert recipe.epochs >= 2
    steps = recipe.train_images // recipe.batch_size * recipe.epochs
    assert steps >= (10 if quick.name == "resnet50-transfer" else 50)
    assert (quick.target, quick.also_at_least, quick.target_share) == (None, None, None)


@each
def test_quick_changes_the_recipe_but_not_the_work(make: Callable[[], Workload]) -> None:
    full, quick = SUITES["full"](make()), SUITES["quick"](make())
    changed = {field.name for field in fields(Workload) if getattr(full, field.name) != getattr(quick, field.name)}
    assert changed <= {"recipe", "target", "also_at_least", "target_share"}
    assert full == make()
    assert (full.recipe.train_images, full.recipe.eval_images) == (None, None)


@each
def test_the_ladder_is_two_epochs_of_our_recipe(make: Callable[[], Workload]) -> None:
    ladder = SUITES["ladder"](make())
    assert ladder.recipe == replace(make().recipe, epochs=2)
    assert (ladder.target, ladder.also_at_least, ladder.target_share) == (None, None, None)


@each
def test_source_augments_flowers_alone(make: Callable[[], Workload]) -> None:
    full, source = make().preprocess, SUITES["source"](make()).preprocess
    if make().name == "resnet50-transfer":
        assert source == full
        assert source.flip
        assert min(source.shear_deg, source.zoom) > 0
    else:
        assert (source.crop_padding, source.flip, source.shear_deg, source.zoom) == (0, False, 0.0, 0.0)
        assert (source.mean, source.std, source.image_size) == (full.mean, full.std, full.image_size)


def test_what_networks_put_out_is_what_they_are_compared_with() -> None:
    """A ReLU rebuilds [0, 1], a tanh draws [-1, 1]: the images must be scaled alike."""
    for name, low, high in [("conv-autoencoder", 0.0, 1.0), ("dcgan", -1.0, 1.0)]:
        preprocess = find(name).preprocess
        assert [(0 - mean) / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True)] == [low] * 3
        assert [(1 - mean) / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True)] == [high] * 3


@each
def test_specs_are_frozen_and_read_nothing(make: Callable[[], Workload], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("a spec reads nothing")

    class NoEnvironment:
        def __getattr__(self, name: str) -> None:
            forbidden()

        __getitem__ = __contains__ = forbidden  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", forbidden)
        patch.setattr(os, "environ", NoEnvironment())
        one, two = make(), make()
        suites = [suite(one) for suite in SUITES.values()]
    assert one == two
    assert suites == [suite(two) for suite in SUITES.values()]
    for spec in (one, one.preprocess, one.metric, one.recipe):
        with pytest.raises(FrozenInstanceError):
            setattr(spec, fields(spec)[0].name, None)


def test_specs_are_made_with_keywords_alone() -> None:
    with pytest.raises(TypeError):
        Recipe(32, 10, "sgd", 0.1)  # type: ignore[misc]
    with pytest.raises(TypeError):
        Preprocess((0.0,), (1.0,))  # type: ignore[misc]


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"epochs": 0}, {"learning_rate": 0.0}, {"learning_rate": -1.0}])
def test_an_impossible_recipe_is_an_error(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"at least 1.*above 0"):
        replace(find("mnist-cnn").recipe, **change)


@pytest.mark.parametrize("every", [0, 5])
def test_evaluations_that_do_not_fit_the_epochs_are_an_error(every: int) -> None:
    with pytest.raises(ValueError, match=f"an evaluation every {every} epochs does not fit 12"):
        replace(find("mnist-cnn").recipe, evaluate_every=every)


@pytest.mark.parametrize("change", [{"optimizer": "adagrad"}, {"schedule": "cosine"}])
def test_an_unknown_name_in_a_recipe_is_an_error(change: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        replace(find("mnist-cnn").recipe, **change)


def test_an_unknown_objective_is_an_error() -> None:
    with pytest.raises(ValueError, match="not one of classify, reconstruct, adversarial"):
        replace(find("mnist-cnn"), objective="segment")


@pytest.mark.parametrize("change", [{"std": (0.0,)}, {"std": (-1.0,)}, {"std": (1.0, 1.0)}, {"mean": (0.0, 0.0)}])
def test_an_impossible_normalisation_is_an_error(change: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="one value a channel"):
        replace(COLOURLESS, **change)


@pytest.mark.parametrize("suite", [suite for suite in SUITES if suite != "open"])
@each
def test_a_record_describes_the_case_and_all_settings(make: Callable[[], Workload], suite: str) -> None:
    case = Case(workload=make().name, suite=suite, tuning="eager", mode="compute", seed=3)
    workload = resolve(case)
    found = json.loads(json.dumps(describe(case, workload)))
    assert found["workload"] == workload.name
    assert (found["suite"], found["tuning"], found["mode"], found["seed"]) == (suite, "eager", "compute", 3)
    assert (found["division"], found["gpus"]) == ("closed", 1)
    for field in fields(Recipe):
        assert found["recipe"][field.name] == getattr(workload.recipe, field.name), field.name
    assert found["recipe"]["preprocess"]["mean"] == list(workload.preprocess.mean)
    assert found["recipe"].get("weights") == workload.weights
    assert str(case) == f"{workload.name} eager compute seed 3"


@pytest.mark.parametrize("make", OPEN, ids=names("open"))
def test_the_open_division(make: Callable[[], Workload]) -> None:
    case = Case(workload=make().name, suite="open", tuning="tuned", seed=3, seeds=2)
    workload = resolve(case)
    found = json.loads(json.dumps(describe(case, workload)))
    assert (found["division"], found["seeds"], found["seed"]) == ("open", [3, 4], 3)
    for field in fields(OpenRecipe):
        assert found["recipe"][field.name] == json.loads(json.dumps(getattr(workload.recipe, field.name))), field.name
    assert workload.target is not None
    assert resolve(replace(case, suite="quick")).target is None
    assert str(case) == f"{workload.name} tuned e2e seeds 3 to 4"


def test_suites_of_another_division_are_refused() -> None:
    for name, suite in (("mnist-cnn", "open"), ("mnist-99", "full"), ("mnist-99", "source"), ("mnist-99", "ladder")):
        with pytest.raises(UserError, match="division: run it by --suite"):
            resolve(Case(workload=name, suite=suite, tuning="tuned"))


def test_recipes_that_cannot_be_trained_are_refused() -> None:
    muon = {"batch_size": 8, "epochs": 3, "optimizer": "muon", "learning_rate": 0.1}
    with pytest.raises(ValueError, match="of the open division"):
        Recipe(**muon)
    with pytest.raises(ValueError, match="needs a head_rate"):
        OpenRecipe(**muon)
    with pytest.raises(ValueError, match="sides for 2 epochs, not 3"):
        OpenRecipe(**muon, head_rate=1.0, bias_rate=1.0, sides=((24, 1), (32, 1)))
