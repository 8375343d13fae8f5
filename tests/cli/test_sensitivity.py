import pytest

import shohin


@pytest.fixture
def command(net):
    return ["sensitivity", f"{net}:known", "--evaluate", f"{net}:kept"]


def test_writes_curves_and_figure(shell, command, tmp_path) -> None:
    file, figure = tmp_path / "curves.csv", tmp_path / "curves.png"
    done = shell(
        *command,
        "--densities",
        "0.1,0.3",
        "-o",
        file,
        "--plot",
        figure,
        "--workdir",
        tmp_path / "w",
    )
    assert done.code == 0, done.err
    heads, conv, fc = (line for line in done.out.splitlines() if "weight" in line)
    assert heads.split() == ["weight", "10", "%", "30", "%"]
    assert conv.split()[0] == "conv.weight"
    assert fc.split()[0] == "fc.weight"
    assert f"{file}: {file.stat().st_size:,} bytes" in done.out
    assert figure.read_bytes().startswith(b"\x89PNG")
    found = shohin.Sensitivity.read_csv(file)
    assert [density for density, _ in found.layers[0].points] == [0.1, 0.3]
    assert len(list((tmp_path / "w").iterdir())) == 1


def test_json_and_chosen_weights(shell, command) -> None:
    found = shell(*command, "--densities", "0.5", "--weights", "fc*", "--json").json()
    assert [layer["weight"] for layer in found["layers"]] == ["fc.weight"]
    assert found["baseline"] == 1.0
    assert found["layers"][0]["points"][0] == [0.5, pytest.approx(1 - 720 / 1476, abs=0.01)]


def test_says_that_nothing_was_written(shell, command) -> None:
    done = shell(*command, "--densities", "0.5")
    assert done.code == 0
    assert "nothing was written: give -o curves.csv" in done.err


@pytest.mark.parametrize(
    ("options", "code", "texts"),
    [
        (["--densities", "0.1;0.3"], 2, ["--densities: expected numbers separated by commas"]),
        (["--densities", "2"], 2, ["above 0 and at most 1, got 2"]),
        (["--densities", ","], 2, ["expected at least one"]),
        (["--weights", "cnv.weight"], 2, ["did you mean 'conv.weight'"]),
        (["--plot", "curves.gif"], 2, ["ends in .png, .pdf, .svg"]),
        (["-o", "/nowhere/curves.csv"], 7, ["there is no folder /nowhere"]),
    ],
)
def test_wrong_input(shell, command, options, code, texts) -> None:
    shell(*command, *options).fails(code, *texts)


def test_evaluate_must_be_given(shell, net) -> None:
    done = shell("sensitivity", f"{net}:known")
    assert done.code == 2
    assert "--evaluate" in done.err
