"""Blocks by name, glob and type."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from locallearn import UserError
from locallearn.engine.blocks import choose, parse_blocks


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)


class Deep(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Unit()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.layer1 = nn.Sequential(Unit(), Deep())
        self.layer2 = nn.Sequential(Unit(), Unit())
        self.head = nn.ModuleDict({"out": nn.Linear(3, 4)})


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        ("stem", ["stem"]),
        (" stem ,layer1.0", ["stem", "layer1.0"]),
        (["layer2.1", "stem"], ["stem", "layer2.1"]),  # in the model's order
        (["stem", "stem"], ["stem"]),
        ("layer?", ["layer1", "layer2"]),
        ("layer*", ["layer1", "layer2"]),  # the star stays within a part
        ("*", ["stem", "layer1", "layer2", "head"]),  # and the model is no part of itself
        ("layer*.?", ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
        ("layer[13].*", ["layer1.0", "layer1.1"]),
        ("*.1.conv", ["layer1.1.conv", "layer2.1.conv"]),
        ("type:Unit", ["layer1.0", "layer1.1.inner", "layer2.0", "layer2.1"]),  # this class alone
        ("stem,layer2.*,type:Deep", ["stem", "layer1.1", "layer2.0", "layer2.1"]),
        (Unit, ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),  # a Deep is a Unit; outermost
        ([Deep, "layer2.0"], ["layer1.1", "layer2.0"]),
        ((nn.Linear,), ["head.out"]),
        ([nn.Module], ["stem", "layer1", "layer2", "head"]),
    ],
    ids=str,
)
def test_what_is_chosen(blocks: Any, names: list[str]) -> None:
    model = Net()
    chosen = choose(model, blocks)
    assert list(chosen) == names
    assert all(chosen[name] is model.get_submodule(name) for name in names)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("stam", r"the model has no module 'stam'; see model.named_modules\(\)"),
        ("layer9.*", r"no module whose name matches 'layer9.\*'"),
        ("type:Unot", r"unknown module type 'Unot'. Did you mean 'Unit'"),
        ([nn.GRU], r"no module of type GRU"),
        ("layer1,layer1.1", r"block 'layer1.1' lies inside block 'layer1'; name one of them"),
        ("type:Unit,layer1", r"'layer1.0' lies inside block 'layer1'"),
        ("", r"blocks=\[\] names no block; leave it out, or use rule 'bp'"),
        (" , ", r"names no block"),
        ([], r"names no block"),
        (["stem", 3], r"blocks holds 3; names, globs and module types are expected"),
        (["stem", None], r"blocks holds None"),
        ("type:Net", r"unknown module type 'Net'"),
        (["auto"], r"no module 'auto'"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_said_in_one_line(blocks: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        choose(Net(), blocks)
    assert "\n" not in str(caught.value)


def test_a_line_of_text() -> None:
    assert parse_blocks(" auto ") == "auto"
    assert parse_blocks("stem, layer*.?,") == ["stem", "layer*.?"]


def test_a_module_that_is_held_twice_goes_by_its_first_name() -> None:
    model = Net()
    model.again = model.layer2
    assert list(choose(model, "layer2")) == list(choose(model, nn.Sequential))[1:] == ["layer2"]
    with pytest.raises(UserError, match="no module 'again'"):
        choose(model, "again")
