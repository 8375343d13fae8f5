import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import shohin
from shohin.errors import SpecError
from shohin.ir.capture import capture
from shohin.ir.encodings import Sparse, same_bits
from shohin.ir.program import Fact, Stage, set_tensor, tensor_of
from shohin.ir.serialise import save_program
from shohin.ir.sharing import codebook_of
from shohin.ir.ternary import Ternary
from shohin.passes.entropy_code import EntropyCode, stream_figures
from shohin.passes.remarks import Reason

COMPRESSION = "prune{density=0.1}, share-weights{bits=4}"


def wide(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10))
    return capture(network, (torch.ones(2, 200),), name="wide")


def optimize(program, text):
    return shohin.optimize(program, text, drift=False)


@pytest.fixture(scope="module")
def compressed():
    return optimize(wide(), COMPRESSION).program


def stored(program):
    return sum(encoding.stored_bytes() for encoding in program.encodings.values())


def test_golden(apply, golden, compressed):
    golden("entropy_code", compressed, apply(EntropyCode(coder="huffman"), compressed).program)


@pytest.mark.parametrize("coder", ["auto", "huffman", "ans"])
def test_values_stay_and_bytes_go(compressed, coder):
    after = optimize(compressed, f"entropy-code{{coder={coder}}}").program
    for name, encoding in after.encodings.items():
        held = compressed.encodings[name]
        assert same_bits(encoding.materialise(), held.materialise())
        assert same_bits(encoding.materialise(), tensor_of(after.module, name).detach())
        assert encoding.stored_bytes() <= held.stored_bytes()
    assert stored(after) < stored(compressed)
    assert Fact.ENTROPY_CODED in after.facts


def test_auto_takes_the_smaller(compressed):
    sizes = {
        coder: stored(optimize(compressed, f"entropy-code{{coder={coder}}}").program)
        for coder in ("auto", "huffman", "ans")
    }
    assert sizes["auto"] <= min(sizes["huffman"], sizes["ans"])


@pytest.mark.parametrize(("coder", "excess"), [("huffman", 1.05), ("ans", 1.02)])
def test_large_layers_come_close_to_their_entropy(coder, excess):
    torch.manual_seed(0)
    program = capture(nn.Linear(1000, 400), (torch.ones(1, 1000),))
    nn.init.normal_(program.module.get_parameter("weight"))
    result = optimize(program, f"{COMPRESSION}, entropy-code{{coder={coder}}}")
    (remark,) = (one for one in result.report.remarks if one.reason == "coded")
    (note,) = result.report.notes()
    assert note.detail == remark.detail
    found = remark.extra
    for stream in ("gap", "index"):
        assert found[f"{stream}_bytes"] <= excess * found[f"{stream}_entropy_bytes"]
    assert (found["gap_coder"], found["index_coder"]) == (coder, coder)
    assert found["index_codebook_bytes"] == 4 * found["centroids"]
    parts = [
        value for key, value in found.items() if key.endswith("bytes") and "entropy" not in key
    ]
    assert sum(parts) == remark.after.stored_bytes


def ternary_program(density):
    """A large weight of which so many elements are not zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(400, 500, generator=generator)
    codes = (drawn < density / 2).to(torch.int8) - (drawn > 1 - density / 2).to(torch.int8)
    held = Ternary.of(codes, 0.25, 0.5, torch.float32)
    program = capture(nn.Linear(500, 400), (torch.ones(1, 500),))
    set_tensor(program.module, "weight", held.materialise())
    return replace(program, encodings={"weight": held}, stage=Stage.ANNOTATED)


@pytest.mark.parametrize(
    ("coder", "density"),
    [
        *(("auto", density) for density in (0.05, 0.3, 0.6)),
        *(("ans", density) for density in (0.05, 0.3, 0.6)),
        # Four elements share a code of a bit at least, more than rare ones need.
        *(("huffman", density) for density in (0.3, 0.6)),
    ],
)
def test_codes_of_ternary_weights_come_close_to_their_entropy(coder, density):
    program = ternary_program(density)
    result = optimize(program, f"entropy-code{{coder={coder}}}")
    held = result.program.encodings["weight"]
    assert torch.equal(held.codes, program.encodings["weight"].codes)
    assert held.coder != "plain"
    assert coder in ("auto", held.coder)
    (remark,) = (one for one in result.report.remarks if one.reason == "coded")
    figures = remark.extra
    share = held.density
    least = -share * np.log2(share / 2) - (1 - share) * np.log2(1 - share)
    # Positive and negative ones are not exactly as frequent.
    assert figures["code_entropy_bytes"] == pytest.approx(200_000 * least / 8, rel=1e-4)
    taken = figures["code_bytes"] + figures["code_table_bytes"]
    assert taken <= 1.03 * figures["code_entropy_bytes"]
    assert held.stored_bytes() == taken + 8 == remark.after.stored_bytes
    assert held.code_bits() == 8 * taken / 200_000
    bits = 8 * figures["code_bytes"] / 200_000
    assert remark.detail == (
        f"weight: 50,008 to {held.stored_bytes():,} bytes; codes {bits:.2f} bits a weight "
        f"({held.coder}, entropy {least:.2f}), tables {figures['code_table_bytes']:,} bytes"
    )


def test_rows_of_ternary_weights_are_no_codes():
    program = ternary_program(0.3)
    held = replace(program.encodings["weight"], rows=torch.linspace(1, 2, 400))
    set_tensor(program.module, "weight", held.materialise())
    coded = optimize(replace(program, encodings={"weight": held}), "entropy-code").program
    found = coded.encodings["weight"]
    figures = stream_figures(found)
    assert figures["code_rows_bytes"] == 1600
    parts = sum(figures[f"code_{part}bytes"] for part in ("", "table_", "rows_"))
    assert parts + 8 == found.stored_bytes()
    assert same_bits(found.materialise(), held.materialise())


def test_ternary_codes_without_any_order_stay_plain():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (4, 4), generator=generator).to(torch.int8)
    held = Ternary.of(codes, 0.25, 0.5, torch.float32)
    program = capture(nn.Linear(4, 4, bias=False), (torch.ones(1, 4),))
    set_tensor(program.module, "weight", held.materialise())
    encoded = replace(program, encodings={"weight": held}, stage=Stage.ANNOTATED)
    result = optimize(encoded, "entropy-code{coder=huffman}")
    assert result.program.encodings["weight"] is held
    (remark,) = result.report.skipped()
    assert (remark.reason, remark.detail) == (
        Reason.TOO_SMALL,
        f"weight is stored as {held.describe()}, 12 bytes; coded it would take no fewer",
    )


def test_the_width_of_gaps_is_chosen_or_given(compressed):
    chosen = optimize(compressed, "entropy-code").program
    fixed = [optimize(compressed, f"entropy-code{{gap_bits={n}}}").program for n in (3, 8)]
    assert [one.encodings["0.weight"].gap_bits for one in fixed] == [3, 8]
    assert stored(chosen) <= min(stored(one) for one in fixed)


def test_what_does_not_get_smaller_stays_plain():
    # Every value as frequent as every other: nothing to gain.
    weight = torch.arange(256.0).repeat(4, 1)
    program = capture(nn.Linear(256, 4, bias=False), (torch.ones(1, 256),))
    with torch.no_grad():
        program.module.get_parameter("weight").copy_(weight)
    after = optimize(program, "share-weights{bits=8}, entropy-code").program
    assert codebook_of(after.encodings["weight"]).coder == "plain"


def test_gaps_alone_are_coded_where_values_are_not_shared():
    after = optimize(wide(), "prune{density=0.1}, entropy-code").program
    held = after.encodings["0.weight"]
    assert isinstance(held, Sparse)
    assert held.coder != "plain"
    assert held.values.describe() == "dense"


def test_a_pass_that_stores_weights_again_takes_the_fact_away():
    coded = optimize(wide(), "prune{density=0.2}, entropy-code").program
    assert Fact.ENTROPY_CODED in coded.facts
    again = optimize(coded, "prune{density=0.1}").program
    assert Fact.ENTROPY_CODED not in again.facts
    assert again.encodings["0.weight"].coder == "plain"


def test_plain_weights_are_skipped():
    result = optimize(wide(), "entropy-code")
    reasons = {one.reason for one in result.report.remarks}
    assert reasons == {Reason.NOT_APPLICABLE}
    assert any("stored as plain numbers" in one.detail for one in result.report.remarks)


def test_reports_show_what_each_layer_takes():
    result = optimize(wide(), f"{COMPRESSION}, entropy-code")
    held = result.program.encodings["0.weight"]
    figures = stream_figures(held)
    weights = held.values.parameters()
    gaps, least = (8 * figures[f"gap_{key}"] / weights for key in ("bytes", "entropy_bytes"))
    entropy = 8 * figures["index_entropy_bytes"] / weights
    line = next(line for line in result.report.markdown().splitlines() if "| streams |" in line)
    assert line == (
        f"| entropy-code | streams | 0.weight: 3,451 to {held.stored_bytes():,} bytes; "
        f"indices 4.00 bits a weight (plain, entropy {entropy:.2f}), "
        f"gaps {gaps:.2f} bits a weight ({held.coder}, entropy {least:.2f}), "
        f"codebook 64 bytes, tables {figures['gap_table_bytes']} bytes |"
    )
    text = " ".join(result.report.text().split())
    assert "indices 4.00 bits a weight" in text
    assert "codebook 64 bytes" in text


def test_what_is_coded_already_is_left_alone(apply, compressed):
    once = optimize(compressed, "entropy-code").program
    again = apply(EntropyCode(), once)
    assert not again.modified
    assert again.reason("linear") == Reason.ALREADY_ENCODED
    stored = once.encodings["0.weight"]
    assert again.remarks[0].detail == (
        f"0.weight is stored as {stored.describe()}, {stored.stored_bytes():,} bytes; "
        "coded again it would be the same"
    )
    assert all(again.program.encodings[name] is once.encodings[name] for name in once.encodings)
    other = apply(EntropyCode(gap_bits=8), once)
    assert other.modified
    assert other.reason("linear") == "coded"


def test_what_coding_does_not_make_smaller_is_skipped(apply):
    program = capture(nn.Linear(256, 4, bias=False), (torch.ones(1, 256),))
    with torch.no_grad():
        program.module.get_parameter("weight").copy_(torch.arange(256.0).repeat(4, 1))
    shared = optimize(program, "share-weights{bits=8}").program
    after = apply(EntropyCode(), shared)
    assert not after.modified
    assert after.reason("linear") == Reason.TOO_SMALL
    assert after.remarks[0].detail == (
        "weight is stored as codebook of 256, 1,536 bytes; coded it would take no fewer"
    )


def test_sites_may_be_left_out(apply, compressed):
    after = apply(EntropyCode(), compressed, lambda site: site != "linear")
    assert after.reason("linear") == Reason.EXCLUDED_BY_OPTION
    assert after.program.encodings["0.weight"] is compressed.encodings["0.weight"]


def test_tied_weights_are_coded_once(compressed):
    program = compressed.copy()
    encodings = {**program.encodings, "twin": program.encodings["0.weight"]}
    program.module.twin = program.module.get_parameter("0.weight")
    program.graph.find_nodes(op="get_attr", target="0.bias")
    with program.graph.inserting_before(next(iter(program.graph.find_nodes(op="output")))):
        extra = program.graph.get_attr("twin")
        program.graph.call_function(torch.ops.aten.relu.default, (extra,))
    after = optimize(replace(program, encodings=encodings), "entropy-code").program
    assert after.encodings["twin"] is after.encodings["0.weight"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("entropy-code{coder=zip}", "zip"),
        ("entropy-code{gap_bits=9}", "expected 1 to 8, got 9"),
    ],
)
def test_errors(text, problem):
    with pytest.raises(SpecError, match=problem):
        optimize(wide(), text)


def test_another_process_reads_the_file(tmp_path):
    program = optimize(wide(), f"{COMPRESSION}, entropy-code").program
    save_program(program, tmp_path / "net.shohin")
    code = f"import shohin; print(shohin.load({str(tmp_path / 'net.shohin')!r}).encodings.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "dict_keys(['0.weight', '2.weight'])\n", done.stderr


def test_the_same_program_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        optimize(wide(), f"{COMPRESSION}, entropy-code").save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded, kept = (shohin.load(tmp_path / "one"), optimize(wide(), COMPRESSION).program)
    for name in kept.encodings:
        assert same_bits(loaded.encodings[name].materialise(), kept.encodings[name].materialise())
