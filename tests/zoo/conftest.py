from pathlib import Path

import pytest
from torch import nn

from shohin import zoo


@pytest.fixture(scope="session")
def data() -> Path:
    folder = zoo.data_folder()
    if folder is None:
        pytest.skip("no data folder: set SHOHIN_DATA to the folder with data sets and weights")
    pytest.importorskip("PIL", reason="the JPEG data sets need Pillow")
    return folder


# With module scope, pytest runs all tests of one model in a row: each model is built once and
# freed before the next.
@pytest.fixture(scope="module", params=zoo.names())
def model_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(model_name: str) -> nn.Module:
    return zoo.build(model_name)
