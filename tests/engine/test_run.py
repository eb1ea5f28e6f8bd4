"""What is read of a run directory's metrics.csv."""

from __future__ import annotations

from pathlib import Path

import pytest

from locallearn.engine import RunDirectory
from locallearn.errors import UserError

HEADER = "epoch,train_loss,train_acc,test_acc,images_per_second,conv1_loss,conv1_acc,val_acc\n"
FIRST = "1,2.1,30.5,31,500.0,2.2,20.5,28\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_metrics_are_read_as_they_were_written(run: RunDirectory) -> None:
    names = HEADER.strip().split(",")
    rows = [dict(zip(names, (i, *(i + 0.1 * n for n in range(7))), strict=True)) for i in (1, 2)]
    run.write_metrics(rows)
    metrics = run.read_metrics()
    assert metrics.columns == {name: (rows[0][name], rows[1][name]) for name in names}
    assert metrics.num_epochs == 2
    assert metrics.blocks() == ("conv1",)


def test_nothing_is_there_yet(run: RunDirectory) -> None:
    assert (run.read_metrics().num_epochs, run.read_metrics().blocks()) == (0, ())
    for text in ("", HEADER):
        run.metrics_path.write_text(text)
        assert run.read_metrics().num_epochs == 0


def test_a_last_line_that_was_cut_is_left_out(run: RunDirectory) -> None:
    run.metrics_path.write_text(HEADER + FIRST + FIRST.strip()[:-1])  # 28 would be read as 2
    assert run.read_metrics().columns["val_acc"] == (28.0,)


def test_values_that_are_missing_or_no_number_are_gaps(run: RunDirectory) -> None:
    run.metrics_path.write_text(HEADER + "1,inf,nan,31,,2.2,20.5,28\n")
    columns = run.read_metrics().columns
    found = [columns[name] for name in ("train_loss", "train_acc", "images_per_second")]
    assert found == [(None,)] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + FIRST + "2\n", r"line 3 is wrong \(1 values for 8 columns\)\. Restore the file"),
        (HEADER + "1,many,30,31,500,2,20,28\n", r"line 2 is wrong \(.*'many'\)"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"), "it is no text"),
        *(
            (HEADER.replace(name, "other"), rf"metrics\.csv can't be read: it has no column {name}")
            for name in ("epoch", "train_acc", "test_acc", "images_per_second")
        ),
    ],
)
def test_metrics_that_are_none_are_named(
    run: RunDirectory, text: str | bytes, message: str
) -> None:
    run.metrics_path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=message):
        run.read_metrics()
