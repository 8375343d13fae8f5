import pytest

from shohin import rivals


def test_library_against_torch(shell, library, net) -> None:
    done = shell("bench", library, "--model", f"{net}:known", "--rounds", 3, "--versus", "torch")
    assert done.code == 0, done.err
    assert done.out.startswith("net, cpu{threads=2}, batch 2, 2 threads, medians of 3 rounds\n")
    shohin, torch, _, footer = done.out.splitlines()[-4:]
    assert footer.startswith("times include the call from Python; the steps of shohin's binary")
    assert shohin.startswith("shohin")
    assert torch.startswith("torch")


def test_program_as_json(shell, program) -> None:
    done = shell("bench", program, "--rounds", 3, "--batch", 4, "--json")
    found = done.json()
    assert [entry["name"] for entry in found["entries"]] == ["shohin", "torch"]
    assert found["entries"][0]["ratio"] == 1
    assert found["own_milliseconds"] > 0
    assert found["entries"][0]["error"] < 1e-5
    assert (found["batch"], found["threads"], found["failures"]) == (4, 1, {})


def test_library_alone(shell, library) -> None:
    found = shell("bench", library, "--rounds", 2, "--threads", 1, "--json").json()
    (entry,) = found["entries"]
    assert entry["error"] is None
    assert found["threads"] == 1


@pytest.mark.parametrize("rival", ["onnxruntime", "openvino"])
def test_other_runtimes(shell, program, rival) -> None:
    pytest.importorskip(rival)
    found = shell("bench", program, "--rounds", 2, "--versus", rival, "--json").json()
    assert found["failures"] == {}
    assert found["entries"][1]["name"] == rival
    assert found["entries"][1]["error"] < 1e-5


def test_missing_rival_names_the_extra(shell, program, monkeypatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None if name == "openvino" else object())
    done = shell("bench", program, "--versus", "openvino")
    done.fails(2, "needs openvino, which is not installed", "pip install 'shohin[bench]'")


def test_rival_that_fails_is_reported(shell, program, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setitem(rivals._RIVALS, "compile", (fail, ()))
    found = shell("bench", program, "--rounds", 2, "--versus", "torch,compile", "--json").json()
    assert found["failures"] == {"compile": "cannot run this model: no such operator"}
    assert [entry["name"] for entry in found["entries"]] == ["shohin", "torch"]


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--versus", "tensorrt"], ["unknown rival 'tensorrt'", "known: compile, onnxruntime"]),
        (["--versus", "torch"], ["nothing to compare with", "--model"]),
        (["--batch", "3"], ["--batch: a compiled model cannot change"]),
        (["--passes", "fold-bn"], ["--passes: a compiled model cannot change"]),
        (["--model", "shohin.zoo:lenet5"], ["takes float32[N,1,28,28], but"]),
    ],
)
def test_wrong_options(shell, library, options, texts) -> None:
    shell("bench", library, *options).fails(2, *texts)
