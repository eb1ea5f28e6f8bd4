"""Curves read from metrics.csv."""

from __future__ import annotations

from pathlib import Path

import pytest

from locallearn.analysis.layers import Curves, read_curves
from locallearn.errors import UserError

HEADER = "epoch,train_loss,train_acc,test_loss,test_acc,step_time_ms,conv1_loss,conv1_acc,val_acc\n"


def test_curves_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + "1,2.1,30.5,2,31,9,2.2,20.5,28\n2,1.9,40,1.8,41.5,9,2.1,22,39\n")
    assert read_curves(path) == Curves([1, 2], [30.5, 40], [31, 41.5], {"conv1": [20.5, 22]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist: the run has no finished epoch yet"),
        (HEADER, "holds no epoch"),
        ("a,b\n1,2\n", "is no metrics.csv of a run"),
        (HEADER + "1,2\n", "is no metrics.csv of a run"),
        (HEADER + "1,2.1,x,2,31,9,2.2,20.5,28\n", "is no metrics.csv of a run"),
    ],
)
def test_bad_metrics(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "metrics.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_curves(path)
