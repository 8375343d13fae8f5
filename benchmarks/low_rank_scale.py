"""What splitting VGG-16 takes: seconds, and memory above that of the model and the images."""

import resource
import time

import torch
from tables import Table, save

import shohin
from shohin import zoo


def measure_scale(images: int) -> None:
    """Split VGG-16 on random images at 224 x 224, 10 positions each."""
    torch.manual_seed(0)
    model = zoo.build("vgg-16").eval()
    program = shohin.capture(model, zoo.example_inputs("vgg-16", 2), name="vgg-16")
    program = shohin.optimize(program, "drop-identity, fold-bn", drift=False).program

    class Noise:
        """Images that are made when they are read, so that none are kept."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            for index in range(images // 20):
                generator = torch.Generator().manual_seed(index)
                yield (torch.randn(20, 3, 224, 224, generator=generator),)

    with torch.inference_mode():
        program.module(next(iter(Noise()))[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    options = f"speedup=4 compare=macs images={images} positions={30000 // images}"
    result = shohin.optimize(program, f"low-rank{{{options}}}", calibration=Noise(), drift=False)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {
        "images": images,
        "positions": 30000 // images,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "gigabytes": round((peak - before) / 1e6, 2),
        "speedup": result.report.before.macs / result.report.after.macs,
    }
    print(row, flush=True)
    table = Table("VGG-16 at 224 x 224, 4x fewer operations, asymmetric", tuple(row))
    table.add(
        *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
    )
    save(f"low_rank_scale_{images}", [row], [table])
