from dataclasses import replace

import pytest
import torch
from torch import nn

import shohin
from shohin.errors import ArtifactError, SpecError
from shohin.ir.program import Stage, set_tensor
from shohin.ir.serialise import save_program
from shohin.ir.ternary import Ternary
from shohin.waterfall import STEPS, draw_waterfall, waterfall

COMPRESSION = "prune{density=0.1}, share-weights{bits=4}, entropy-code"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waterfall")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10))
    nn.init.normal_(network[0].weight)
    program = shohin.capture(network, (torch.ones(2, 200),))
    texts = {"plain": "make-functional", "pruned": "prune{density=0.1}", "coded": COMPRESSION}
    texts["shared"] = COMPRESSION.removesuffix(", entropy-code")
    for name, text in texts.items():
        shohin.optimize(program, text, drift=False).save(folder / f"{name}.shohin")
    return folder


def test_every_byte_of_the_file_is_counted(files):
    for path in files.iterdir():
        found = waterfall(path)
        assert found.totals[-1] == path.stat().st_size
        assert found.totals[0] == 4 * (200 * 150 + 150 + 150 * 10 + 10)


def test_steps_are_what_files_before_them_hold(files):
    plain, pruned, shared, coded = (
        {fall.name: fall for fall in waterfall(files / f"{name}.shohin").falls}
        for name in ("plain", "pruned", "shared", "coded")
    )
    for name, fall in coded.items():
        frame = [
            plain[name].stored - fall.original,
            pruned[name].stored - fall.pruned,
            shared[name].stored - fall.quantised,
        ]
        # Tags, lengths, shapes and checksums.
        assert all(0 <= extra <= 40 for extra in frame)
    assert coded["0.weight"].stored < coded["0.weight"].quantised < coded["0.weight"].pruned


def test_integers_are_counted_before_they_are_coded(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10))
    program = shohin.capture(network, (torch.ones(2, 200),))
    text = "fixed-point{weights=6 fc_weights=6}, entropy-code"
    batches = [(torch.randn(4, 200),)]
    shohin.optimize(program, text, calibration=batches, drift=False).save(tmp_path / "net.shohin")
    falls = {fall.name: fall for fall in waterfall(tmp_path / "net.shohin").falls}
    weight = falls["0.weight"]
    bits = 6 * 200 * 150
    assert weight.original == weight.pruned == 4 * 200 * 150
    assert bits // 8 <= weight.quantised <= bits // 8 + 16
    assert weight.stored < weight.quantised


@pytest.mark.parametrize("coder", ["plain", "huffman"])
def test_ternary_weights_are_quantised_ones(tmp_path, coder):
    program = shohin.capture(nn.Linear(200, 150, bias=False), (torch.ones(2, 200),))
    drawn = torch.rand(150, 200, generator=torch.Generator().manual_seed(0))
    codes = (drawn < 0.1).to(torch.int8)
    held = replace(Ternary.of(codes, 0.25, 0.5, torch.float32), coder=coder)
    set_tensor(program.module, "weight", held.materialise())
    encoded = replace(program, encodings={"weight": held}, stage=Stage.ANNOTATED)
    save_program(encoded, tmp_path / "net.shohin")
    (weight,) = waterfall(tmp_path / "net.shohin").falls
    assert (weight.original, weight.pruned) == (120_000, 120_000)
    assert weight.quantised == 30_000 // 4 + 8
    # Its checksum and the frame of its section come on top.
    assert 0 < weight.stored - held.stored_bytes() < 64
    assert (weight.stored < weight.quantised) == (coder == "huffman")


def test_what_passes_removed_counts(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10))
    program = shohin.capture(network, (torch.ones(2, 200),))
    text = "prune{granularity=channel densities={0.weight: 0.5}}, remove-dead, share-weights"
    shohin.optimize(program, text, drift=False).save(tmp_path / "net.shohin")
    found = waterfall(tmp_path / "net.shohin")
    whole = 4 * (200 * 150 + 150 + 150 * 10 + 10)
    assert found.totals[0] == program.captured_bytes == whole
    assert found.removed == 4 * 75 * (200 + 1 + 10)
    row = next(row for row in found.grid().rows if row[0] == "removed")
    assert row[2] == f"{found.removed:,}"


def test_a_table_of_it(files):
    grid = waterfall(files / "coded.shohin").grid()
    assert grid.columns == ("weight", "encoding", *(f">{step}" for step in STEPS), ">smaller")
    assert [row[0] for row in grid.rows] == ["0.bias", "0.weight", "2.bias", "2.weight", "header"]
    assert grid.footer[-2] == f"{(files / 'coded.shohin').stat().st_size:,}"


def test_it_can_be_drawn(files, tmp_path):
    found = waterfall(files / "coded.shohin")
    drawn = draw_waterfall(found, tmp_path / "bytes.svg").read_text()
    assert all(step in drawn for step in ("pruned", "quantised", "in the file"))
    with pytest.raises(SpecError, match=r"expected a name that ends in \.png"):
        draw_waterfall(found, tmp_path / "bytes.txt")


def test_broken_files(tmp_path):
    (tmp_path / "net.shohin").write_bytes(b"\x89SHOHIN\n\x02\x00")
    with pytest.raises(ArtifactError, match="truncated or corrupted"):
        waterfall(tmp_path / "net.shohin")
