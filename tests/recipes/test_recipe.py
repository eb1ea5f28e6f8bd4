"""The tables that come with the package, and files of a user's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from locallearn.data import InputSpec
from locallearn.engine.building import build_learner
from locallearn.errors import UserError
from locallearn.recipes import Recipe, list_tables, read_table

# Channels, height and width, classes.
SHAPES = {
    "mnist": (1, 28, 10),
    "fashion-mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
    "imagenette": (3, 128, 10),
    "tiny-imagenet": (3, 64, 200),
    "vww": (3, 128, 2),
}
RECIPES = [recipe for table in list_tables() for recipe in read_table(table).recipes]


def test_the_papers_tables_are_there_with_all_their_rows() -> None:
    assert list_tables() == ["table1", "table2", "table3"]
    rows = {
        name: {(r.settings.model, r.settings.dataset) for r in read_table(name).recipes}
        for name in list_tables()
    }
    four = ("mnist", "fashion-mnist", "cifar10", "imagenette")
    assert rows["table1"] == {(model, data) for model in ("smallconv", "vgg8") for data in four}
    assert rows["table2"] == {("smallconv-l", data) for data in ("mnist", "cifar10", "cifar100")}
    photos = ("cifar10", "cifar100", "imagenette", "tiny-imagenet")
    assert rows["table3"] == {("vgg8", data) for data in photos} | {("mobilenet-v1", "vww")}
    assert [len(read_table(name).recipes) for name in list_tables()] == [24, 15, 30]


def test_columns_of_each_table() -> None:
    one, two, three = (read_table(name).recipes for name in list_tables())
    assert {(r.settings.rule, r.settings.basis) for r in one} == {
        ("lls", basis) for basis in ("cosine", "square", "random")
    }
    assert [r.settings.rule for r in two[:5]] == ["bp", "lls", "dfa", "drtp", "pepita"]
    rules = ["bp", "local-losses", "lls", "lls-m", "lls-mxm", "lls-s"]
    assert [r.settings.rule for r in three[:6]] == rules
    assert all(r.settings.basis == "square" for r in three if r.settings.rule.startswith("lls"))


# The paper's, as the design has them: epochs of each network on each dataset, and what each
# augmentation is made of.
EPOCHS = {
    **{("smallconv", data): 100 for data in ("mnist", "fashion-mnist", "cifar10", "imagenette")},
    **{("smallconv-l", data): 100 for data in ("mnist", "cifar10", "cifar100")},
    **{("vgg8", data): 100 for data in ("mnist", "fashion-mnist")},
    **{("vgg8", data): 300 for data in ("cifar10", "cifar100", "imagenette", "tiny-imagenet")},
    ("mobilenet-v1", "vww"): 500,
}
AUGMENTATIONS = {"smallconv": "basic", "smallconv-l": "basic", "vgg8": "standard"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_has_the_papers_settings(recipe: Recipe) -> None:
    settings = recipe.settings.resolve()
    assert recipe.seeds == (0, 1, 2, 3, 4)
    assert settings.epochs == EPOCHS[settings.model, settings.dataset]
    assert settings.augment == AUGMENTATIONS.get(settings.model, "standard")
    assert (settings.batch_size, settings.weight_decay, settings.dropout) == (128, 0, 0)
    assert (settings.schedule, settings.norm, settings.width) == ("none", "batch", 1)
    if settings.rule == "pepita":  # its own paper's
        assert (settings.optimizer, settings.lr) == ("sgd", 0.01)
    else:
        assert (settings.optimizer, settings.lr) == ("schedulefree-adamw", 5e-3)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_takes_a_step(recipe: Recipe, one_thread: None) -> None:
    """On an image of its dataset's size, in a narrow form of its network: losses are finite."""
    num_channels, side, num_classes = SHAPES[recipe.settings.dataset]
    settings = dataclasses.replace(recipe.settings, width=1 / 8, backend="autograd").resolve()
    inputs = InputSpec((side, side), num_channels)
    learner = build_learner(settings, inputs, num_classes, device=torch.device("cpu"))
    result = learner.step(torch.randn(2, num_channels, side, side), torch.tensor([0, 1]))
    assert result.logits.shape == (2, num_classes)
    for loss in (result.loss, *result.block_losses.values()):
        assert torch.isfinite(loss)


MINE = """
title = "Mine"
[defaults]
seeds = [3, 1]
dataset = "digits"
model = "smallconv"
epochs = 2
[[recipe]]
name = "a"
rule = "lls"
[[recipe]]
name = "b"
rule = "lls-mxm"
epochs = 5
seeds = [7]
"""


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    table = read_table(str(path))
    assert (table.name, table.title, table.source) == ("mine", "Mine", "")
    first, second = table.recipes
    assert (first.name, first.settings.rule, first.settings.epochs) == ("a", "lls", 2)
    assert first.seeds == (3, 1)
    assert (second.settings.dataset, second.num_epochs, second.seeds) == ("digits", 5, (7,))


def test_only() -> None:
    table = read_table("table1")
    kept = table.only(["smallconv-mnist-*", "vgg8-*-random"])
    assert len(kept.recipes) == 3 + 4
    assert kept.is_part
    assert table.only([]) == table
    assert not table.is_part
    with pytest.raises(UserError, match=r"unknown recipe of table1 'smallconv-mnsit-square'.*Did"):
        table.only(["smallconv-mnsit-square"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Mine"', "title = 3", "title and source must be text"),
        ('title = "Mine"', 'name = "x"', "unknown key 'name'"),
        ('title = "Mine"', "title = ", "is no valid TOML"),
        ("[defaults]", '[defaults]\nname = "x"', "without a name"),
        ('name = "a"\n', "", "recipe 1: name is missing"),
        ('rule = "lls"\n', "", "recipe a: rule is missing"),
        ("seeds = [3, 1]\n", "", "recipe a: seeds is missing"),
        ('name = "a"', 'name = "../a"', "names a directory"),
        ('name = "b"', 'name = "a"', "two recipes are called 'a'"),
        ('rule = "lls"', 'rule = "llls"', "recipe a: unknown rule 'llls'. Did you mean 'lls'"),
        ('rule = "lls"', 'rule = "lls"\nbasys = "square"', "unknown setting 'basys'"),
        ('rule = "lls"', 'rule = "lls"\nseed = 3', "seed belongs to a run or a machine"),
        ('rule = "lls"', 'rule = "lls"\ndevice = "cpu"', "device belongs to a run or a machine"),
        ('rule = "lls"', 'rule = "bp"\nbasis = "square"', "recipe a: .*basis"),
        (
            'rule = "lls"',
            'rule = "lls"\nlr = "fast"',
            "recipe a: lr must be of type float, got 'fast'",
        ),
        ('rule = "lls"', "rule = 3", "recipe a: rule must be of type str, got 3"),
        ('rule = "lls"', 'rule = "lls"\naugment = 3', "augment must be of type str, got 3"),
        ('rule = "lls"', 'rule = "lls"\nhead_after_pool = "no"', "must be of type bool"),
        ('rule = "lls"', 'rule = "lls"\nlimit_train = -3', "--limit-train must be at least 1"),
        ("epochs = 5", "epochs = 5.5", "recipe b: epochs must be of type int, got 5.5"),
        ("epochs = 5", "epochs = true", "recipe b: epochs must be of type int, got True"),
        ("seeds = [7]", "seeds = 7", "seeds must be a list of different whole numbers, got 7"),
        ("seeds = [7]", "seeds = [7, 7]", "different whole numbers"),
        ("seeds = [7]", "seeds = [-7]", "recipe b: --seed must be between 0"),
        ("epochs = 5", "epochs = 0", "recipe b: --epochs must be at least 1"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert MINE.count(old) == 1
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace(old, new))
    with pytest.raises(UserError, match=message) as error:
        read_table(str(path))
    assert "mine.toml" in str(error.value)


def test_no_recipe_no_file_no_table(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text('title = "x"')
    with pytest.raises(UserError, match="holds no recipe"):
        read_table(str(tmp_path / "empty.toml"))
    with pytest.raises(UserError, match=r"none.toml can't be read: No such file"):
        read_table(str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match=r"unknown table 'table4'.*path of a .toml file"):
        read_table("table4")
