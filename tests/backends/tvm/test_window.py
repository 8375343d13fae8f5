import random

import numpy as np
import pytest
from harness import Array, KernelLibrary, random_array, to_blocked, to_plain

from shohin.backends.tvm.kernels.window import Window


def _crop(
    start: tuple[int, int, int] = (0, 0, 0),
    step: tuple[int, int] = (1, 1),
    *,
    channels: tuple[int, int] = (32, 32),
    size: tuple[int, int] = (6, 7),
    output: tuple[int, int] = (6, 7),
    value: float = 0.0,
    batch: int = 1,
) -> Window:
    return Window(batch, channels[0], size, channels[1], output, start, step, value)


_CHOSEN = {
    "copy": _crop(),
    "crop": _crop((0, 1, 2), output=(4, 3)),
    "step": _crop((0, 0, 1), (2, 3), output=(3, 2)),
    "pad": _crop((0, -1, -2), output=(9, 10), value=1.5),
    "pad and step": _crop((0, -2, -1), (2, 2), output=(5, 5), value=-1.0),
    "channels in front, whole blocks": _crop((-16, 0, 0), channels=(32, 64)),
    "channels in front, 8": _crop((-8, 0, 0), channels=(16, 32), value=3.0),
    "channels in front, ragged": _crop((-5, 0, 0), channels=(20, 33)),
    "channels behind": _crop(channels=(20, 50), value=2.0),
    "channel slice": _crop((16, 0, 0), channels=(48, 16)),
    "ragged channel slice": _crop((7, 0, 0), channels=(50, 20)),
    "channel slice across blocks": _crop((3, 0, 0), channels=(40, 37)),
    "one channel": _crop((17, 0, 0), channels=(32, 1)),
    "nothing of the input": _crop((40, 0, 0), channels=(32, 16), value=4.0),
    "rows outside": _crop((0, 10, 0), value=4.0),
    "shortcut of a residual net": _crop(
        (-8, 0, 0), (2, 2), channels=(16, 32), size=(8, 8), output=(4, 4), batch=3
    ),
}


def _draw(seed: int) -> Window:
    choose = random.Random(seed)
    size = (choose.randint(1, 6), choose.randint(1, 6))
    return _crop(
        (choose.randint(-20, 20), choose.randint(-2, 3), choose.randint(-2, 3)),
        (choose.randint(1, 3), choose.randint(1, 3)),
        channels=(choose.randint(1, 50), choose.randint(1, 50)),
        size=size,
        output=(choose.randint(1, 8), choose.randint(1, 8)),
        value=choose.choice([0.0, -2.5]),
        batch=choose.randint(1, 2),
    )


_CASES = {**_CHOSEN, **{f"random {seed}": _draw(seed) for seed in range(25)}}


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(_CASES.values())


def _expected(window: Window, x: Array) -> Array:
    """Element by element, as the kernel's docstring says."""
    shape = (window.batch, window.output_channels, *window.output_size)
    y = np.full(shape, window.value, np.float32)
    for channel, row, column in np.ndindex(shape[1:]):
        place = (
            channel + window.start[0],
            row * window.step[0] + window.start[1],
            column * window.step[1] + window.start[2],
        )
        if all(0 <= i < size for i, size in zip(place, x.shape[1:], strict=True)):
            y[:, channel, row, column] = x[:, place[0], place[1], place[2]]
    return y


@pytest.mark.parametrize("name", _CASES)
def test_against_numpy(library: KernelLibrary, name: str) -> None:
    window = _CASES[name]
    x = random_array(np.random.default_rng(8), window.batch, window.channels, *window.size)
    found = to_plain(library.run(window, [to_blocked(x)]), window.output_channels)
    np.testing.assert_array_equal(found, _expected(window, x))


@pytest.mark.parametrize("name", _CASES)
def test_missing_channels_of_the_input_are_not_copied(library: KernelLibrary, name: str) -> None:
    window = _CASES[name]
    x = random_array(np.random.default_rng(8), window.batch, window.channels, *window.size)
    blocked = to_blocked(x)
    if window.channels % 16:
        blocked[:, -1, ..., window.channels % 16 :] = np.nan
    assert not np.isnan(library.run(window, [blocked])).any()
