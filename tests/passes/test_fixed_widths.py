"""Widths of weights under a budget."""

import pytest
import torch
from fixed_networks import Chain, fixed, images, network

from shohin.errors import ArtifactError, PassError
from shohin.passes.fixed.widths import Candidate, Evaluations, choose_widths


def test_widths_that_a_budget_allows(tmp_path):
    program, x = network(), images(200, seed=8)
    with torch.no_grad():
        wanted = program.module(x)
        centred = wanted - wanted.mean(0)
    calls = []

    def evaluate(module):
        calls.append(None)
        with torch.no_grad():
            return 100 - 100 * float((module(x) - wanted).norm() / centred.norm())

    options = {"evaluate": evaluate, "workdir": tmp_path, "resume": True}
    text = "fixed-point{bits=auto max_drop=%s}"
    sizes = {}
    for drop in ("30.0", "60.0"):
        found = fixed(program, text % drop, [(x,)], **options).program
        assert evaluate(found.module) >= 100 - float(drop)
        bits = {name: encoding.bits for name, encoding in found.encodings.items()}
        assert min(bits.values()) < 8
        sizes[drop] = sum(e.bits * e.parameters() for e in found.encodings.values())
    assert sizes["60.0"] < sizes["30.0"]
    spent = len(calls)
    for file in tmp_path.glob("*.shohin"):
        file.unlink()
    again = fixed(program, text % "60.0", [(x,)], **options).program
    assert {n: e.bits for n, e in again.encodings.items()} == bits
    # The layers alone are known from the file.
    assert len(calls) - spent < 10


def test_a_budget_that_cannot_be_met():
    text = r"fixed-point max_drop: expected an evaluation of at least 1, got 0 with the most bits"
    wanted = images(2)
    exact = network().module(wanted)

    def evaluate(module):
        return float(torch.equal(module(wanted), exact))

    with pytest.raises(PassError, match=text):
        fixed(network(), "fixed-point{bits=auto max_drop=0.0}", evaluate=evaluate)


def test_a_broken_file_of_evaluations(tmp_path):
    evaluations = Evaluations.of(tmp_path, ["a"], resume=True)
    assert evaluations.get("w", 4, lambda name, bits: 0.5) == 0.5
    again = Evaluations.of(tmp_path, ["a"], resume=True)
    assert again.get("w", 4, lambda name, bits: 0.0) == 0.5
    assert not Evaluations.of(tmp_path, ["b"], resume=True).known
    assert not Evaluations.of(tmp_path, ["a"], resume=False).known
    (file,) = tmp_path.iterdir()
    file.write_text("[")
    with pytest.raises(ArtifactError, match=r"cannot be read: .*; delete it to evaluate anew"):
        Evaluations.of(tmp_path, ["a"], resume=True)


def test_widths_go_where_they_save_most_for_what_they_lose():
    layers = [Candidate("a", 100, 8), Candidate("b", 1000, 8)]
    drops = {"a": {8: 0.0, 4: 0.1, 2: 0.5}, "b": {8: 0.0, 4: 0.3, 3: 0.9}}
    assert choose_widths(layers, drops, 0.05) == {"a": 8, "b": 8}
    assert choose_widths(layers, drops, 0.1) == {"a": 4, "b": 8}
    assert choose_widths(layers, drops, 0.4) == {"a": 4, "b": 4}
    assert choose_widths(layers, drops, 1.5) == {"a": 2, "b": 3}


def test_widths_are_chosen_by_what_the_network_computes():
    """What is evaluated first is the network with the most bits, as it would come out."""
    program, x = network(Chain), images(16, seed=8)
    with torch.no_grad():
        wanted = program.module(x)
    calls = []

    def evaluate(module):
        with torch.no_grad():
            calls.append(-float((module(x) - wanted).abs().mean()))
        return calls[-1]

    fixed(program, "fixed-point{bits=auto max_drop=1.0}", [(x,)], evaluate=evaluate)
    plain = fixed(program, "fixed-point", [(x,)]).program
    # The program twice, for the report and for the budget; then the most bits.
    assert calls[:2] == [0, 0]
    assert calls[2] == evaluate(plain.module) < 0
