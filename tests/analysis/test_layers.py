"""Curves read from metrics.csv."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from locallearn.analysis.layers import Curves, read_curves
from locallearn.engine import RunDirectory
from locallearn.errors import UserError

HEADER = "epoch,train_loss,train_acc,test_acc,images_per_second,conv1_loss,conv1_acc,val_acc\n"


def test_curves_by_hand(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics_path.write_text(HEADER + "1,2.1,30.5,31,9,2.2,20.5,28\n2,1.9,40,41.5,9,2.1,22,39\n")
    expected = Curves([1, 2], [30.5, 40], [31, 41.5], {"conv1": [20.5, 22]})
    assert read_curves(run) == expected


def test_a_missing_value_is_drawn_as_a_gap(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics_path.write_text(HEADER + "1,2.1,30.5,31,9,2.2,,28\n")
    assert math.isnan(read_curves(run).blocks["conv1"][0])


@pytest.mark.parametrize("text", [None, HEADER])
def test_no_epoch_yet(tmp_path: Path, text: str | None) -> None:
    run = RunDirectory(tmp_path)
    if text is not None:
        run.metrics_path.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.csv holds no epoch: the run has finished none"):
        read_curves(run)
