"""The page as a browser gets it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from locallearn.analysis.report import collect_runs, render_report

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
VOID = {"meta", "link", "img", "input", "br", "hr"}
BLOCKS = ("conv1", "conv2", "linear1")


class Page(HTMLParser):
    """Elements and the text of tables; a tag that closes what is not open fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # innermost element, text
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))  # of SVG

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))


def page_of(*paths: Path, title: str | None = None) -> Page:
    return Page(html_of(*paths, title=title))


def html_of(*paths: Path, title: str | None = None) -> str:
    return render_report(collect_runs(paths), title, now=NOW)


def values_of(html: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="values">(.*?)</script>', html)
    return json.loads(text)


@pytest.fixture
def several(make_run) -> list[Path]:
    """Two seeds of lls, bp, an unfinished run, and another model."""
    return [
        make_run("lls/seed-0", (50.0, 60.0, 90.0), seed=0, blocks=BLOCKS),
        make_run("lls/seed-1", (40.0, 60.0, 80.0), seed=1, blocks=BLOCKS),
        make_run("bp", (55.0, 96.0, 95.0), rule="bp"),
        make_run("begun", (30.0,), rule="dfa"),
        make_run("other", rule="bp", model="smallconv-l"),
    ]


def test_nothing_is_fetched(several) -> None:
    (several[0] / "figures").mkdir()
    (several[0] / "figures/a.svg").write_text("<svg/>")
    html = html_of(*several)
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
            if name in attributes:
                assert re.match(r"#|data:image/", attributes[name] or ""), (tag, attributes[name])
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in html
    assert "url(" not in html
    for word in ("fetch(", "XMLHttpRequest", "import(", "WebSocket", "sendBeacon"):
        assert word not in html


def test_policy_lets_the_page_s_own_script_run_and_no_other(several) -> None:
    html = html_of(*several)
    metas = {m.get("http-equiv"): m.get("content") for m in Page(html).all("meta")}
    policy = metas["Content-Security-Policy"]
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_page_is_well_formed_and_has_its_parts(several) -> None:
    page = page_of(*several)
    assert page.all("html")[0]["lang"] == "en"
    for tag in ("header", "nav", "main", "h1"):
        assert len(page.all(tag)) == 1, tag
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["href"].removeprefix("#") in ids
    for section in page.all("section"):
        assert section["aria-labelledby"] in ids
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert all(image["alt"] for image in page.all("img"))


def test_table_says_the_results(several) -> None:
    page = page_of(*several)
    cells = [text for tag, text in page.texts if tag in ("td", "strong")]
    assert "85.00 ± 7.07" in cells  # 90 and 80
    assert "90.00" in cells  # by itself
    assert "1 of 3" in cells
    # The highest of its model, and not the best on the way; a model's only run is no winner.
    assert [text for tag, text in page.texts if tag == "strong"] == ["95.00"]
    assert "96.00" in cells
    assert "5 runs; 1 group of runs that differ in the seed alone; 1 not finished" in page.text()


def test_summary_names_the_best(make_run) -> None:
    text = page_of(make_run("a", rule="bp"), make_run("b", (1.0, 2.0, 3.0))).text()
    assert re.search(r"highest test accuracy 70\.00 % bp next: lls, 3\.00", text)
    assert re.search(r"fewest learning-signal MACs \S+ k an image lls next: bp", text)
    assert "shortest step" not in text  # both took 250 ms
    assert "highest" not in page_of(make_run("alone")).text().replace("Bold: the highest", "")


def test_summary_counts_those_that_are_equally_good(make_run) -> None:
    names = {"a": 0.1, "b": 0.2, "c": 0.3}
    runs = [make_run(name, dropout=dropout) for name, dropout in names.items()]
    text = page_of(*runs, make_run("d", (1.0, 2.0, 3.0))).text()
    assert "highest test accuracy 70.00 % lls, dropout 0.1 and 2 more; next: lls, 3.00" in text


def test_times_of_different_devices_have_no_winner(make_run) -> None:
    runs = [make_run("a"), make_run("b", rule="bp")]
    slower = runs[1] / "metrics.csv"
    slower.write_text(slower.read_text().replace("250.0", "300.0"))
    assert "shortest step 250.0 ms lls next: bp, 300.0" in page_of(*runs).text()
    config = runs[1] / "config.json"
    config.write_text(config.read_text().replace("a processor", "another processor"))
    assert "shortest step" not in page_of(*runs).text()


@pytest.mark.parametrize(
    ("other", "has_time", "has_memory"),
    [
        ({}, True, True),
        ({"batch_size": 32}, False, False),
        ({"precision": "bf16"}, False, False),
        ({"compile": True}, False, False),  # whose memory is not counted
        ({"num_threads": 2}, False, True),
        ({"environment": {"device_name": "another"}}, False, True),
        # Other test images: two tasks, and no winner of anything.
        ({"data": {"fingerprint": "1-3"}}, False, False),
    ],
)
def test_only_what_compares_has_a_winner(make_run, other, has_time, has_memory) -> None:
    runs = [make_run("a", backend="reference"), make_run("b", (1.0, 2.0, 3.0), rule="bp", **other)]
    slower = runs[1] / "metrics.csv"
    slower.write_text(slower.read_text().replace("250.0", "300.0"))
    page = page_of(*runs)
    headings = [text for tag, text in page.texts if tag == "dt"]
    assert ("shortest step" in headings) == has_time
    assert ("least activation memory" in headings) == has_memory
    is_one_task = "data" not in other
    assert ("highest test accuracy" in headings) == is_one_task
    assert [text for tag, text in page.texts if tag == "strong"] == ["70.00"] * is_one_task


def test_measured_memory_is_told_from_counted(make_run) -> None:
    lls, bp = make_run("lls/seed-0"), make_run("bp/seed-0", rule="bp")
    text = page_of(lls, bp).text()
    assert re.search(r"[\d.]+† counted", text)
    assert "held more" in text
    (lls.parent / "step.json").write_text('{"peak_activation_mib": 7.25}')
    page = page_of(lls, bp)
    cells = [text for tag, text in page.texts if tag == "td"]
    assert cells.count("7.25 measured") == 2  # in the table and beside the bar
    assert sum(cell.endswith(" counted") for cell in cells) == 2
    assert "held more" not in page.text()
    assert "least activation memory" not in page.text()  # measured against counted
    (bp.parent / "step.json").write_text('{"peak_activation_mib": 9.5}')
    assert "least activation memory 7.25 MiB lls next: bp, 9.5" in page_of(lls, bp).text()


def test_a_folder_s_data_is_named(make_run) -> None:
    page = page_of(make_run("a", dataset="folder", data_dir="/data/cats"))
    assert ("h1", "lls on cats, smallconv") in page.texts
    assert ("td", "cats (folder)") in page.texts


def test_charts_hold_the_values(several) -> None:
    values = values_of(html_of(*several))
    chart = values["t0-test_acc"]
    lls = chart["series"][0]
    assert (lls["label"], lls["x"], lls["y"]) == ("lls", [1, 2, 3], [45.0, 60.0, 85.0])
    assert lls["std"] == [7.07, 0.0, 7.07]
    assert values["t0-test_acc-s"]["series"][0]["x"] == [2.0, 4.0, 6.0]
    begun = chart["series"][2]
    assert (begun["x"], begun["y"], begun["std"]) == ([1], [30.0], [])
    depth = values["t0-depth0"]
    assert depth["names"] == [*BLOCKS, "output"]
    assert depth["series"][0]["y"] == [75.0, 74.0, 73.0, 86.0]
    assert [each["label"] for each in values["t0-block0"]["series"]] == list(BLOCKS)
    assert "t1-test_acc" in values


def test_every_chart_has_its_values(several) -> None:
    html = html_of(*several)
    drawn = {svg["data-chart"] for svg in Page(html).all("svg") if "data-chart" in svg}
    assert drawn == set(values_of(html))
    labels = {g["data-series"] for g in Page(html).all("li") if "data-series" in g}
    assert labels == {"lls", "bp", "dfa"}


def test_what_people_wrote_is_harmless(make_run) -> None:
    evil = "</script><script>alert(1)</script>"
    path = make_run("<script>alert(0)<", blocks=(evil,), environment={"device_name": evil})
    twin = make_run("<img src=x onerror=alert(2)>", environment={"device_name": evil})
    (path / "figures").mkdir()
    (path / "figures/a.svg").write_text(f"<svg>{evil}</svg>")
    (path / "figures/a.json").write_text(json.dumps({"caption": evil, "command": evil}))
    html = html_of(path, twin, title=evil)
    page = Page(html)
    assert len(page.all("script")) == 2
    assert [image["src"][:19] for image in page.all("img")] == ["data:image/svg+xml;"]
    assert "alert(" in html
    assert not re.search(r"<(script|img)[^>]*>alert|<img src=x", html)
    assert ("h1", evil) in page.texts
    assert values_of(html)["t0-block0"]["series"][0]["label"].startswith("\N{HORIZONTAL ELLIPSIS}")


def test_figures_are_embedded(make_run) -> None:
    path = make_run("a")
    (path / "figures").mkdir()
    (path / "figures/spectra.svg").write_bytes(b"<svg>1</svg>")
    (path / "figures/spectra.json").write_text('{"caption": "Spectra of the 4th block"}')
    (path / "figures/cam.png").write_bytes(b"png")
    page = page_of(path)
    cam, spectra = page.all("img")
    assert (
        spectra["src"] == "data:image/svg+xml;base64," + base64.b64encode(b"<svg>1</svg>").decode()
    )
    assert spectra["alt"] == "spectra"
    assert cam["src"] == "data:image/png;base64,cG5n"
    # Each in a box that scrolls; the run's name stays with the first of them when printed.
    html = html_of(path)
    assert len(re.findall(r'<div class="scroll" tabindex="0"[^>]*><img ', html)) == 2
    assert len(re.findall(r'<div class="first">\s*<h3>a</h3>\s*<figure>', html)) == 1
    assert ("figcaption", "cam.png") in page.texts


def test_commands_are_those_of_the_runs(several) -> None:
    commands = [
        text for tag, text in page_of(*several).texts if tag == "code" and " train " in text
    ]
    assert len(commands) == 5
    model = "--dataset digits --model smallconv --rule lls"
    rest = "--epochs 3 --device cpu --backend autograd --num-threads 1"
    assert commands[0] == f"locallearn train {model} {rest}"
    assert commands[1] == f"locallearn train {model} {rest} --seed 1"


def test_commands_keep_the_data_and_leave_the_cache(make_run) -> None:
    run = make_run("a", dataset="folder", data_dir="/data/cats", cache="/tmp/decoded")
    (command,) = [text for _, text in page_of(run).texts if text.startswith("locallearn train ")]
    assert "--data-dir /data/cats" in command
    assert "--cache" not in command


def test_run_without_an_epoch_alone(make_run) -> None:
    page = page_of(make_run("a", ()))
    assert "0 of 3" in page.text()
    assert not [svg for svg in page.all("svg") if "data-chart" in svg]
    assert "#curves" not in [link["href"] for link in page.all("a")]


def test_run_of_one_epoch_shows_its_point(make_run) -> None:
    html = html_of(make_run("a", (50.0,), epochs=1, blocks=("conv1",)))
    (chart,) = re.findall(r'<svg class="chart"[^>]*data-chart="t0-test_acc".*?</svg>', html)
    assert re.search(r'<path class="marks" d="M\d', chart)


def test_names_of_many_blocks_have_room(make_run) -> None:
    blocks = ["stem", *(f"separable{i}" for i in range(1, 14))]
    html = html_of(make_run("a", blocks=blocks))
    (chart,) = re.findall(r'<svg class="chart"[^>]*data-chart="t0-depth0".*?</svg>', html)
    shown = re.findall(r'<text class="tick x" x="([\d.]+)"[^>]*>([^<]+)</text>', chart)
    assert [name for _, name in shown] == [
        "stem",
        "separable3",
        "separable6",
        "separable9",
        "output",
    ]
    places = [float(x) for x, _ in shown]
    assert min(b - a for a, b in itertools.pairwise(places)) > 10 * 8
    assert values_of(html)["t0-depth0"]["names"] == [*blocks, "output"]


def test_losses_of_zero_and_equal_values_are_drawn(make_run) -> None:
    path = make_run("a", (100.0, 100.0, 100.0))
    lines = (path / "metrics.csv").read_text().splitlines()
    (path / "metrics.csv").write_text(
        "\n".join([lines[0], *(re.sub(r"^(\d),[^,]*", r"\1,0.0", line) for line in lines[1:]), ""])
    )
    Page(html_of(path))


def test_sixty_runs(make_run) -> None:
    paths = [
        make_run(f"{dropout}/seed-{seed}", (10.0, 20.0, 30.0 + i), seed=seed, dropout=dropout / 100)
        for i, (dropout, seed) in enumerate((d, s) for d in range(30) for s in range(2))
    ]
    html = html_of(*paths)
    page = Page(html)
    assert len(html) < 1_000_000
    assert len([a for a in page.all("tr") if a.get("class") == "group"]) == 30
    assert len([a for a in page.all("tr") if a.get("class") == "single"]) == 60
    assert len(values_of(html)["t0-test_acc"]["series"]) == 30


def test_the_same_runs_make_the_same_page(several) -> None:
    assert html_of(*several) == html_of(*several)
