from pathlib import Path

import pytest
import torch

import shohin
from shohin.cli.names import load_object

WHEN = ("before", "after")


def test_writes_the_program_and_the_report(shell, net, tmp_path) -> None:
    file, report = tmp_path / "net.shohin", tmp_path / "report.json"
    done = shell(
        *("optimize", f"{net}:model", "--passes", "fold-bn, prune{density=0.5}"),
        *("--data", f"{net}:batches", "--evaluate", f"{net}:accuracy"),
        *("-o", file, "--report", report),
    )
    assert done.code == 0, done.err
    assert "evaluation" in done.out
    assert "dense → sparse 50.0%" in done.out
    assert "removed: bn" in done.out
    assert done.out.splitlines()[-2] == f"{file}: {file.stat().st_size:,} bytes"
    assert shohin.load(file).history == ("fold-bn", "prune{density=0.5}")
    assert '"stored_bytes"' in report.read_text()


def test_says_that_nothing_was_written(shell, net) -> None:
    done = shell("optimize", f"{net}:known", "--passes", "fold-bn")
    assert done.code == 0
    assert "nothing was written" in done.err


def test_json_is_all_that_is_printed(shell, net) -> None:
    done = shell(
        "optimize", f"{net}:model", "--input-shape", "2x1x8x8", "--passes", "fold-bn", "--json"
    )
    found = done.json()
    assert found["pipeline"] == "fold-bn"
    assert [layer["name"] for layer in found["layers"]] == ["conv", "bn", "fc"]
    assert found["layers"][1]["after"] is None


def test_resumes_from_checkpoints(shell, net, tmp_path) -> None:
    command = ["optimize", f"{net}:known", "--workdir", tmp_path / "run", "--resume", "--passes"]
    assert shell(*command, "fold-bn").code == 0
    done = shell(*command, "fold-bn, prune")
    assert done.code == 0
    (line,) = (line for line in done.out.splitlines() if line.startswith("fold-bn "))
    assert "resumed" in line


def test_takes_a_program_file(shell, program) -> None:
    done = shell("optimize", program, "--passes", "prune", "--json")
    assert done.json()["after"]["nonzeros"] < done.json()["before"]["nonzeros"]


def test_takes_an_exported_program(shell, net, tmp_path) -> None:
    build = load_object(f"{net}:model", "MODEL")
    assert callable(build)
    file = tmp_path / "exported.pt2"
    torch.export.save(torch.export.export(build(), (torch.zeros(1, 1, 8, 8),)), file)
    found = shell("optimize", file, "--passes", "fold-bn", "--json").json()
    assert (found["name"], found["before"]["parameters"]) == ("exported", 1498)


def test_several_inputs_of_other_types(shell, tmp_path) -> None:
    (tmp_path / "two.py").write_text(
        "import torch\n"
        "class Two(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.Embedding(9, 4)\n"
        "    def forward(self, tokens, scale):\n"
        "        return self.table(tokens) * scale\n"
    )
    shapes = ("--input-shape", "int64[2x3]", "--input-shape", "2x1x4")
    found = shell("inspect", f"{tmp_path}/two.py:Two", *shapes, "--json").json()
    assert found["inputs"] == {"tokens": "int64[N,3]", "scale": "float32[N,1,4]"}


def test_zoo_models_bring_their_inputs(shell) -> None:
    done = shell("optimize", "shohin.zoo:lenet5", "--passes", "fold-bn", "--json")
    assert done.json()["before"]["parameters"] == 431080


def test_prints_the_program_around_passes(shell, net) -> None:
    done = shell("optimize", f"{net}:known", "--passes", "fold-bn", "--print-after", "fold-bn")
    assert "# after fold-bn\nprogram known" in done.out
    command = ("optimize", f"{net}:known", "--passes", "fold-bn, prune")
    done = shell(*command, "--print-before", "prune")
    assert "# before prune\nprogram known" in done.out
    assert "# before fold-bn" not in done.out
    done = shell(*command, "--print-before", "all", "--print-after", "all")
    printed = [line for line in done.out.splitlines() if line.startswith("# ")]
    assert printed == [f"# {when} {name}" for name in ("fold-bn", "prune") for when in WHEN]


def test_weights_that_are_not_finite_are_reported_and_kept(shell, net, tmp_path) -> None:
    file = tmp_path / "nan.shohin"
    done = shell(
        *("optimize", f"{net}:nan_model", "--input-shape", "2x1x8x8"),
        *("--passes", "prune", "-o", file),
    )
    assert done.code == 0
    assert "warning: nan_model: weights that are NaN or infinite are kept" in done.err
    assert "not-finite" in done.out
    assert bool(shohin.load(file).module.fc.weight.isnan().any())


@pytest.mark.parametrize(
    ("passes", "code", "texts"),
    [
        ("fold-bn, prun", 2, ["unknown pass 'prun'", "           ^", "did you mean 'prune'?"]),
        ("prune{densty=0.1}", 2, ["unknown option 'densty'", "did you mean 'density'"]),
        ("prune{density=2}", 2, ["0 < density <= 1", "                ^"]),
        ("prune{density=low}", 2, ["expected float, got 'low'"]),
        ("prune{density=0.1", 2, ["'{' is never closed"]),
        ("", 2, ["expected at least one name, got an empty text"]),
    ],
)
def test_wrong_pipelines(shell, net, passes, code, texts) -> None:
    shell("optimize", f"{net}:known", "--passes", passes).fails(code, *texts)


@pytest.mark.parametrize(
    ("name", "options", "code", "texts"),
    [
        ("model", [], 2, ["the shapes of its inputs are not known", "--input-shape 1x3x32x32"]),
        ("model", ["--input-shape", "1xx8"], 2, ["expected a shape such as 1x3x32x32"]),
        ("model", ["--input-shape", "complex9[3]"], 2, ["expected a shape such as"]),
        ("model", ["--input-shape", "2x1x8"], 3, ["torch cannot export this model"]),
        ("model", ["--input-shape", "int64[2x1x8x8]"], 3, ["torch cannot export this model"]),
        ("branch", ["--input-shape", "2x3"], 3, ["the graph may not depend on values"]),
        ("modl", [], 2, ["has no 'modl'", "did you mean 'model'"]),
        ("number", [], 2, ["expected a function without arguments, got 3"]),
        ("accuracy", [], 2, ["failed when it was called: TypeError"]),
        ("broken", [], 2, ["ZeroDivisionError", "return 1 / 0"]),
        ("known", ["--data", "NET:labelled"], 3, ["2 example inputs do not fit forward"]),
        (
            "known",
            ["--data", "NET:labelled", "--input-shape", "2x1x8x8"],
            8,
            ["calibration batch 0: expected 1 tensor", "without labels"],
        ),
        ("known", ["--data", "NET:number"], 2, ["expected a function without arguments"]),
        ("known", ["--data", "NET:model"], 2, ["expected an iterable of tuples of tensors"]),
        ("known", ["--evaluate", "NET:nothing"], 2, ["return a number, got NoneType"]),
        ("known", ["--evaluate", "NET:number"], 2, ["to be a function, got int"]),
        ("known", ["--evaluate", "NET:broken"], 1, ["takes 0 positional arguments", "--debug"]),
        ("known", ["--resume"], 2, ["there is nothing to resume from", "give a workdir"]),
        ("known", ["-o", "/nowhere/net.shohin"], 7, ["there is no folder /nowhere"]),
        ("known", ["--report", "report.pdf"], 2, [".json, .md or .txt"]),
        ("known", ["--print-after", "prune"], 2, ["pass 'prune' is not in the pipeline"]),
    ],
)  # fmt: skip
def test_wrong_input(shell, net, name, options, code, texts) -> None:
    given = [option.replace("NET", net) for option in options]
    shell("optimize", f"{net}:{name}", "--passes", "fold-bn", *given).fails(code, *texts)


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        ("net.py", ["expected a name with a colon, got 'net.py'", "write file.py:name"]),
        ("nowhere.py:model", ["nowhere.py: there is no such file"]),
        ("nowhere.net:model", ["there is no module 'nowhere'", "nowhere/net.py"]),
        ("shohin.zoo:resnet21", ["has no 'resnet21'", "did you mean 'resnet"]),
    ],
)
def test_models_that_do_not_exist(shell, model, texts) -> None:
    shell("optimize", model, "--passes", "fold-bn").fails(2, *texts)


def test_error_in_the_file_of_a_model_shows_its_line(shell, tmp_path) -> None:
    (tmp_path / "boom.py").write_text("import torch\nx = torch.zeros(3).no_such()\n")
    done = shell("optimize", f"{tmp_path}/boom.py:model", "--passes", "fold-bn")
    done.fails(2, "failed when it was imported: AttributeError", "boom.py:2: x = torch.zeros(3)")


def test_a_file_may_be_called_like_a_module_of_python(shell, net, tmp_path) -> None:
    (tmp_path / "types.py").write_text(Path(net).read_text())
    assert shell("optimize", f"{tmp_path}/types.py:known", "--passes", "fold-bn").code == 0


def test_impossible_order(shell, net, monkeypatch) -> None:
    from shohin.ir import Fact
    from shohin.passes.prune import Prune

    monkeypatch.setattr(Prune, "requires", frozenset({Fact.BN_FOLDED}))
    done = shell("optimize", f"{net}:known", "--passes", "prune, fold-bn")
    done.fails(4, "pass 'prune' (1 of 2)", "requires 'bn-folded'", "put 'fold-bn'")


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}", b"not a program"])
def test_foreign_program_files(shell, tmp_path, content) -> None:
    file = tmp_path / "net.shohin"
    file.write_bytes(content)
    shell("optimize", file, "--passes", "fold-bn").fails(7, str(file))


def test_truncated_program_file(shell, program, tmp_path) -> None:
    file = tmp_path / "net.shohin"
    file.write_bytes(program.read_bytes()[:-100])
    shell("optimize", file, "--passes", "fold-bn").fails(7, "truncated: expected")


def test_truncated_exported_program(shell, tmp_path) -> None:
    file = tmp_path / "net.pt2"
    file.write_bytes(b"PK\3\4")
    shell("optimize", file, "--passes", "fold-bn").fails(3, "truncated or foreign")
