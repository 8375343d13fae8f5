import json

import pytest
from ternary_networks import make, small, trainer

from shohin.errors import ShohinWarning, SpecError
from shohin.ir.program import tensor_of
from shohin.ir.ternarising import Threshold, ternary_codes
from shohin.passes.ternarising.figures import CURVES
from shohin.passes.ternarising.history import HISTORY


def history(folder):
    return json.loads((folder / HISTORY).read_text(), parse_constant=lambda text: pytest.fail(text))


def test_the_history_of_a_training(tmp_path):
    told = []
    train = trainer(
        epochs=3, schedule="constant", progress=lambda done, total, label: told.append(label)
    )
    result = make(train=train, workdir=tmp_path)
    points = history(tmp_path)
    assert [point["epoch"] for point in points] == [0, 1, 2, 3]
    assert points[0]["loss"] is None
    # The same mean that the trainer tells, in four digits.
    means = [label.rpartition(" ")[2] for label in told]
    assert [f"{point['loss']:.4g}" for point in points[1:]] == means
    for name in ("4.weight", "7.weight"):
        weight = tensor_of(small().module, name).detach()
        codes = ternary_codes(weight, Threshold(0.05))
        mean = float(weight[codes != 0].double().abs().mean())
        assert points[0]["positive"][name] == pytest.approx(mean, rel=2**-23)
        assert points[0]["zeros"][name] == pytest.approx(1 - float((codes != 0).double().mean()))
        held = result.program.encodings[name]
        pair = held.scales.materialise().tolist()
        assert [points[3]["positive"][name], points[3]["negative"][name]] == pair
        assert points[3]["zeros"][name] == 1 - held.density
    assert all(point["zeros"].keys() == {"4.weight", "7.weight"} for point in points)


def stop_after(epochs):
    def progress(done, total, label):
        if done == epochs:
            raise KeyboardInterrupt

    return progress


def test_the_history_goes_on_after_an_interruption(tmp_path):
    whole = tmp_path / "whole"
    make(train=trainer(epochs=4), workdir=whole)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        make(train=trainer(epochs=4, progress=stop_after(2)), workdir=cut)
    assert len(history(cut)) == 3
    make(train=trainer(epochs=4), workdir=cut, resume=True)
    assert history(cut) == history(whole)


def test_points_of_epochs_that_are_done_again_go(tmp_path):
    make(train=trainer(epochs=3), workdir=tmp_path)
    first = history(tmp_path)
    for path in (*tmp_path.glob("training-*"), *tmp_path.glob("*.shohin")):
        path.unlink()
    make(train=trainer(epochs=3), workdir=tmp_path, resume=True)
    assert history(tmp_path) == first
    assert [point["epoch"] for point in first] == [0, 1, 2, 3]


def test_a_point_that_an_interruption_has_cost_is_a_gap(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(train=trainer(epochs=3, progress=stop_after(2)), workdir=tmp_path)
    path = tmp_path / HISTORY
    path.write_text(json.dumps(history(tmp_path)[:2]))
    make(train=trainer(epochs=3), workdir=tmp_path, resume=True)
    assert [point["epoch"] for point in history(tmp_path)] == [0, 1, 3]


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '[{"epoch": 0}]', "null", "7"])
def test_a_broken_history_begins_anew(tmp_path, content):
    (tmp_path / HISTORY).write_text(content)
    with pytest.warns(ShohinWarning, match="ternary-history.json is not used, its curves begin"):
        make(workdir=tmp_path, resume=True)
    assert [point["epoch"] for point in history(tmp_path)] == [0, 1, 2]


def test_the_history_of_other_layers_is_not_continued(tmp_path):
    pytest.importorskip("matplotlib")
    make("ternary{keep_first=false}", workdir=tmp_path)
    make("ternary{figures=true}", workdir=tmp_path, resume=True)
    points = history(tmp_path)
    assert [point["epoch"] for point in points] == [0, 1, 2]
    assert all(point["zeros"].keys() == {"4.weight", "7.weight"} for point in points)


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    make("ternary{figures=true}", workdir=tmp_path / "new")
    assert (tmp_path / "new" / CURVES).read_bytes().startswith(b"\x89PNG")
    make(workdir=tmp_path / "plain")
    assert not (tmp_path / "plain" / CURVES).exists()


def test_what_curves_show(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.append(self))
    make("ternary{figures=true}", train=trainer(epochs=3), workdir=tmp_path)
    points = history(tmp_path)
    loss, zeros, positive, negative = drawn[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[p["epoch"], p["loss"]] for p in points[1:]]
    assert [line.get_label() for line in zeros.lines] == ["4.weight", "7.weight"]
    for axes, key, factor in (
        (zeros, "zeros", 100),
        (positive, "positive", 1),
        (negative, "negative", 1),
    ):
        for line in axes.lines:
            found = [[p["epoch"], factor * p[key][line.get_label()]] for p in points]
            assert line.get_xydata().tolist() == found


def test_without_a_folder_nothing_is_drawn():
    with pytest.raises(SpecError) as caught:
        make("ternary{figures=true}")
    assert (
        "ternary figures: needs a work directory, got none; "
        "give workdir=..., or --workdir on the command line"
    ) in str(caught.value)
