from pathlib import Path

import pytest
import torch

from shohin import zoo
from shohin.errors import SpecError
from shohin.zoo.datasets import cifar10_jpeg, cifar10_lossless, imagenet, mnist
from shohin.zoo.weights import pretrained_names


@pytest.mark.parametrize("name", pretrained_names())
def test_evaluation_images_fit_their_net(name: str, data: Path) -> None:
    images, labels = zoo.evaluation_set(name, data, limit=20)
    architecture = name.removesuffix("-cifar10jpeg")
    assert images.shape == (20, *zoo.entry(architecture).input_shape)
    assert images.dtype == torch.float32
    assert labels.shape == (20,)
    assert labels.dtype == torch.int64
    assert len(set(labels.tolist())) > 5


@pytest.mark.parametrize("name", ["lenet-5", "resnet-20", "squeezenet-1.1"])
def test_calibration_images_are_not_evaluation_images(name: str, data: Path) -> None:
    evaluation, _ = zoo.evaluation_set(name, data, limit=20)
    calibration, _ = zoo.calibration_set(name, data, limit=20)
    assert calibration.shape == evaluation.shape
    assert not torch.equal(calibration, evaluation)


def test_raw_images_are_bytes(data: Path) -> None:
    assert mnist("test", data, 5)[0].shape == (5, 28, 28)
    assert cifar10_lossless("train", data)[0].shape == (3805, 32, 32, 3)
    assert cifar10_jpeg("test", data, 5)[0].shape == (5, 32, 32, 3)
    assert imagenet("calib", data, 2)[0].dtype == torch.uint8


def test_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOHIN_DATA", str(tmp_path))
    assert zoo.data_folder() == tmp_path
    with pytest.raises(SpecError, match=r"holds no file mnist\.npz.*SHOHIN_DATA"):
        mnist("test")


def test_absent_folder_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOHIN_DATA", str(tmp_path / "absent"))
    assert zoo.data_folder() is None
    with pytest.raises(SpecError, match="SHOHIN_DATA"):
        zoo.pretrained("lenet-5")


def test_argument_comes_before_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOHIN_DATA", str(tmp_path / "absent"))
    with pytest.raises(SpecError, match="holds no file"):
        zoo.pretrained("lenet-5", tmp_path)


def test_unknown_split_is_refused(data: Path) -> None:
    for load in (mnist, cifar10_lossless, cifar10_jpeg, imagenet):
        with pytest.raises(SpecError, match="'dev'"):
            load("dev", data)


def test_unknown_net_suggests_a_near_one() -> None:
    with pytest.raises(SpecError, match="'vgg-9'"):
        zoo.evaluation_set("vgg9")
