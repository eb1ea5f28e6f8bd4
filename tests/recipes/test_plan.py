"""Which runs a table is made of, and what of them is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from locallearn.engine import TrainConfig
from locallearn.errors import UserError
from locallearn.recipes import (
    CellState,
    Changes,
    DatasetPlace,
    RecipeTable,
    make_plan,
    read_table,
    rehearsal_lines,
)


def test_every_recipe_with_its_first_seed_comes_first(table: RecipeTable, tmp_path: Path) -> None:
    plan = make_plan(table, Changes(), tmp_path)
    assert [cell.name for cell in plan.cells] == [
        "digits-lls, seed 0",
        "digits-bp, seed 0",
        "digits-lls, seed 1",
        "digits-bp, seed 1",
    ]
    assert plan.cells[2].path == tmp_path / "digits-lls" / "4-epochs" / "seed-1"
    assert [cell.seed for cell in plan.of(table.recipes[1])] == [0, 1]
    assert [plan.departures(recipe) for recipe in table.recipes] == [(), ()]
    assert rehearsal_lines(plan) == []
    assert plan.name == "digits"
    assert make_plan(table, Changes(), tmp_path, seeds=[1, 0]).name == "digits"


def test_a_rehearsal_is_another_run_and_says_so(table: RecipeTable, tmp_path: Path) -> None:
    changes = Changes(epochs_scale=0.5, precision="bf16", limit_train=64, limit_test=32)
    plan = make_plan(table, changes, tmp_path, seeds=[5])
    (first, second) = plan.cells
    assert first.path == tmp_path / "digits-lls" / "2-epochs-64-train-32-test-bf16" / "seed-5"
    settings = first.settings
    assert (settings.epochs, settings.precision, settings.seed) == (2, "bf16", 5)
    assert (settings.limit_train, settings.limit_test) == (64, 32)
    words = ("2 of 4 epochs", "64 train images", "32 test images", "bf16")
    words = (*words, "seeds 5 instead of 0, 1")
    assert [plan.departures(recipe) for recipe in table.recipes] == [words, words]
    assert rehearsal_lines(plan) == ["; ".join(words)]
    assert second.recipe.name == "digits-bp"
    assert plan.name == "digits-rehearsal"


def test_fewer_seeds_and_fewer_rows(table: RecipeTable, tmp_path: Path) -> None:
    plan = make_plan(table, Changes(), tmp_path, seeds=[1])
    assert rehearsal_lines(plan) == ["1 of 2 seeds: 1"]
    part = make_plan(table.only(["digits-bp"]), Changes(), tmp_path)
    assert rehearsal_lines(part) == []
    assert part.name == "digits-part"


def test_a_departure_of_some_recipes_names_them(tmp_path: Path) -> None:
    table = read_table("table3").only(["vgg8-cifar10-bp", "mobilenet-v1-vww-bp"])
    plan = make_plan(table, Changes(epochs_scale=0.01), tmp_path, seeds=range(5))
    assert rehearsal_lines(plan) == [
        "3 of 300 epochs (vgg8-cifar10-bp)",
        "5 of 500 epochs (mobilenet-v1-vww-bp)",
    ]


@pytest.mark.parametrize(("scale", "epochs"), [(1.0, 100), (0.05, 5), (0.001, 1), (0.014, 1)])
def test_epochs_scale(scale: float, epochs: int) -> None:
    recipe = read_table("table1").recipes[0]
    assert Changes(epochs_scale=scale).apply(recipe, 0).epochs == epochs


@pytest.mark.parametrize("name", ["limit_train", "limit_test"])
def test_limits_out_of_range(table: RecipeTable, tmp_path: Path, name: str) -> None:
    for number in (0, -5):
        with pytest.raises(UserError, match=r"recipe digits-lls: --limit-\w+ must be at least 1"):
            make_plan(table, Changes(**{name: number}), tmp_path)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan")])
def test_epochs_scale_out_of_range(scale: float) -> None:
    with pytest.raises(UserError, match="--epochs-scale must be above 0 and at most 1"):
        Changes(epochs_scale=scale)


def test_a_mapped_dataset(tmp_path: Path) -> None:
    table = read_table("table1").only(["smallconv-*-square"])
    changes = Changes(
        dataset_map={"cifar10": DatasetPlace("folder", "images")}, data_dir="there", cache="cache"
    )
    by_name = {c.recipe.name: c.settings for c in make_plan(table, changes, tmp_path).cells}
    mapped, other = by_name["smallconv-cifar10-square"], by_name["smallconv-mnist-square"]
    assert (mapped.dataset, mapped.data_dir, mapped.cache) == ("folder", "images", "cache")
    # MNIST has no image files, and so no cache.
    assert (other.dataset, other.data_dir, other.cache) == ("mnist", "there", None)
    assert by_name["smallconv-imagenette-square"].cache == "cache"
    # Other data, normalised and augmented in its own way, is another experiment.
    plan = make_plan(table, changes, tmp_path)
    (cifar10,) = (r for r in table.recipes if r.settings.dataset == "cifar10")
    assert plan.departures(cifar10) == (
        "folder for cifar10, normalised and augmented as folder is",
    )
    assert plan.of(cifar10)[0].folder.name == "100-epochs-folder"
    # The recipe's own augmentation and epochs stay.
    assert (mapped.augment, mapped.epochs) == ("basic", 100)
    with pytest.raises(UserError, match=r"--dataset-map digits: no recipe .* uses it"):
        make_plan(table, Changes(dataset_map={"digits": DatasetPlace("mnist", None)}), tmp_path)


def test_a_setting_that_does_not_go_with_a_recipe_names_it(
    table: RecipeTable, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="recipe digits-lls: unknown precision 'fp8'"):
        make_plan(table, Changes(precision="fp8"), tmp_path)


def test_states(table: RecipeTable, tmp_path: Path, put_run: Callable) -> None:
    plan = make_plan(table, Changes(), tmp_path)
    missing, started, done, _ = plan.cells
    put_run(started)
    put_run(done, 50.0)
    assert missing.state() is CellState.MISSING
    assert started.state() is CellState.STARTED
    assert done.state() is CellState.DONE
    # A summary that was cut off is none.
    (done.path / "summary.json").write_text('{"test_acc": 5')
    assert done.state() is CellState.STARTED


def test_a_run_with_other_settings_is_refused(
    table: RecipeTable, tmp_path: Path, put_run: Callable
) -> None:
    cell = make_plan(table, Changes(), tmp_path).cells[0]
    put_run(dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, lr=0.1)), 50.0)
    with pytest.raises(UserError, match=r"other settings: --lr \(there: 0.1, recipe: 0.005\)"):
        cell.state()


def test_the_machine_a_run_was_made_on_does_not_matter(
    table: RecipeTable, tmp_path: Path, put_run: Callable
) -> None:
    cell = make_plan(table, Changes(num_threads=2), tmp_path).cells[0]
    elsewhere = dataclasses.replace(
        cell.settings, num_threads=1, backend="reference", data_dir="/mnt"
    )
    put_run(dataclasses.replace(cell, settings=elsewhere), 50.0)
    assert cell.state() is CellState.DONE


def test_what_does_not_matter_names_settings() -> None:
    from locallearn.recipes.plan import _OF_THE_MACHINE

    assert {field.name for field in dataclasses.fields(TrainConfig)} >= _OF_THE_MACHINE


NET = """
[defaults]
dataset = "digits"
rule = "lls"
epochs = 4
seeds = [0]
[[recipe]]
name = "own"
model = "net.py:build"
[[recipe]]
name = "theirs"
model = "torchvision:resnet18:stem=cifar"
blocks = "layer*.?"
"""


def test_models_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put_run: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.toml").write_text(NET)
    table = read_table("net.toml")
    with pytest.raises(UserError, match=r"recipe own: there is no file \S*/net.py"):
        make_plan(table, Changes(), tmp_path)
    Path("net.py").write_text("raise RuntimeError('not run to plan')")
    own, theirs = make_plan(table, Changes(), tmp_path).cells
    assert theirs.settings.blocks == "layer*.?"
    for cell in (own, theirs):
        put_run(cell, 50.0)
        assert cell.state() is CellState.DONE
    Path("net.py").write_text("edited")
    with pytest.raises(UserError, match=r"other settings: the sha256 of the file of net.py:build"):
        own.state()
    assert theirs.state() is CellState.DONE
