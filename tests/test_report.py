"""Reports and the layers that they add up."""

import json

import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.layers import layers_of, totals_of
from shohin.passes.instruments.drift import Error, PassDrift
from shohin.passes.remarks import Outcome, Remark
from shohin.report import PassRow, Report, plain
from shohin.tables import Grid, change, ratio, render, shape_text


class Tied(nn.Module):
    """Two linear maps that share a weight, a product of activations, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x)) + self.offset
        return y @ y.transpose(1, 2)


@pytest.fixture(scope="module")
def program() -> shohin.Program:
    torch.manual_seed(0)
    return shohin.capture(Tied().eval(), torch.zeros(2, 3, 6))


@pytest.fixture(scope="module")
def report(program) -> Report:
    batch = (torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)),)
    pipeline = "fold-bn, prune{density=0.25 scope=global}"
    return shohin.optimize(
        program, pipeline, calibration=[batch], evaluate=lambda module: 0.5
    ).report


def test_layers_add_up_to_the_totals(program) -> None:
    for current in (program, shohin.optimize(program, "prune").program):
        layers, totals = layers_of(current), totals_of(current)
        for figure in ("parameters", "nonzeros", "macs", "nonzero_macs", "stored_bytes"):
            assert sum(getattr(layer, figure) for layer in layers) == getattr(totals, figure)


def test_shared_weight_counts_once(program) -> None:
    first, second, *_ = layers_of(program)
    assert (first.name, first.kind, first.shapes) == ("first", "Linear", ((6, 6),))
    assert (first.parameters, first.stored_bytes) == (42, 168)
    assert (second.parameters, second.stored_bytes) == (0, 0)
    assert (first.macs, second.macs) == (108, 108)


def test_text(report) -> None:
    text = report.text()
    lines = text.splitlines()
    assert lines[0] == "tied: fold-bn, prune{density=0.25 scope=global}"
    assert all(line == line.rstrip() and len(line) <= 120 for line in lines)
    (stored,) = (line.split() for line in lines if line.startswith("stored bytes"))
    assert stored == ["stored", "bytes", "192", "88", "2.18x"]
    assert any(line.startswith("evaluation") for line in lines)
    assert "dense → sparse 25.0%" in text
    assert "2.1e+" not in text
    (heads,) = (line for line in lines if line.startswith("pass  ") and "seconds" in line)
    assert "max error   relative error" in heads
    assert heads.endswith("relative in total")


def test_json_is_plain_and_complete(report) -> None:
    described = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert described["evaluation"] == {"before": 0.5, "after": 0.5}
    assert [row["text"] for row in described["passes"]] == report.pipeline.split(", ")
    assert described["before"]["parameters"] == 42
    assert {remark["pass_name"] for remark in described["remarks"]} >= {"prune"}
    assert len(described["layers"]) == len(report.layers)


@pytest.mark.parametrize(
    ("name", "start"), [("r.json", "{"), ("r.md", "# tied\n"), ("r.txt", "tied: ")]
)
def test_saves_by_ending(report, tmp_path, name, start) -> None:
    file = report.save(tmp_path / name)
    assert file.read_text().startswith(start)


def test_refuses_what_it_cannot_save(report, tmp_path) -> None:
    with pytest.raises(shohin.SpecError, match=r"expected a name that ends in \.json, \.md"):
        report.save(tmp_path / "report.html")
    with pytest.raises(shohin.ArtifactError, match="cannot be written"):
        report.save(tmp_path / "missing" / "report.txt")


def test_markdown_has_a_table_for_each_part(report) -> None:
    text = report.markdown()
    assert "## Layers" in text
    assert "## Passes" in text
    assert "| total | before | after | change |" in text


def test_removed_and_new_layers(report) -> None:
    layer = report.layers[0]
    gone = shohin.report.LayerChange("gone", layer.before, None)
    made = shohin.report.LayerChange("made", None, layer.after)
    changed = shohin.report.Report(
        "net", "", report.before, report.after, (gone, made), (), report.remarks
    )
    assert changed.removed() == ("gone",)
    assert "removed: gone" in changed.text()
    assert "Removed: gone." in changed.markdown()
    (row,) = (line for line in changed.text().splitlines() if line.startswith("first"))
    assert row.endswith("new")


def test_skipped_layers_are_grouped_by_reason(report) -> None:
    remarks = tuple(
        Remark("prune", f"conv{index}", f"layer{index}", Outcome.SKIPPED, "too-small", "tiny")
        for index in range(9)
    )
    remarks += (Remark("prune", "fc", "", Outcome.SKIPPED, "not-finite", "1 is NaN"),)
    changed = Report("net", "prune", report.before, report.after, (), (), remarks)
    text = changed.text()
    assert "layer5 and 3 more" in text
    (row,) = (line.split() for line in text.splitlines() if "not-finite" in line)
    assert row == ["prune", "not-finite", "fc", "1", "is", "NaN"]


def test_figures_that_are_not_finite_become_texts(report) -> None:
    drift = PassDrift("prune", Error(float("nan"), float("inf")), Error(0.0, 0.0))
    row = PassRow("prune", None, 0, 0, drift)
    changed = Report("net", "prune", report.before, report.after, (), (row,), ())
    (found,) = changed.to_json()["passes"]
    assert found["drift"]["step"] == {"absolute": "nan", "relative": "inf"}
    assert "resumed" in changed.text()
    assert plain((1, float("-inf"))) == [1, "-inf"]


def test_tables() -> None:
    grid = Grid("Title", ("name", ">figure"), (("a|b", "1"), ("[c]", "22")), ("sum", "23"))
    assert render([grid], 80).splitlines() == [
        "Title",
        "name   figure",
        "─────────────",
        "a|b         1",
        "[c]        22",
        "",
        "sum        23",
    ]
    assert grid.markdown().splitlines()[2:] == [
        "| name | figure |",
        "| --- | ---: |",
        "| a\\|b | 1 |",
        "| [c] | 22 |",
        "| sum | 23 |",
    ]


def test_wide_tables_lose_their_optional_columns() -> None:
    rows = (("a" * 20, "b" * 20, "c" * 20),)
    grid = Grid("", ("x", "y", ">z"), rows, ("1", "2", "3"), optional=("y", ">z"))
    assert grid.width() == 66
    assert grid.fit(66).columns == ("x", "y", ">z")
    assert grid.fit(65).columns == ("x", ">z")
    assert grid.fit(42).footer == ("1",)
    assert grid.fit(3).columns == ("x",)
    assert all(len(line) <= 50 for line in render([grid], 50).splitlines())


def test_small_texts() -> None:
    assert change("1", "2") == "1 → 2"
    assert change("1", "1") == change("", "1") == "1"
    assert ratio(100, 8) == "12.5x"
    assert ratio(1, 1) == ratio(1, 0) == ""
    assert shape_text([(2, 3), ()]) == "2x3 + scalar"


def test_notes_have_a_table_of_their_own(program) -> None:
    report = shohin.optimize(
        program,
        "prune{density=0.25 rounds=2}",
        train=lambda module: None,
        evaluate=lambda module: 0.5,
    ).report
    assert [note.extra["round"] for note in report.notes()] == [1, 2]
    assert "round 2 of 2: 9 of 36 weights left (25.0%), evaluation 0.5" in report.markdown()
    assert json.loads(json.dumps(report.to_json()))["remarks"][0]["outcome"] == "noted"
