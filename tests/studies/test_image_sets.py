import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from core_gates.errors import GatesError
from studies.generalization import FASHION_FOLDER, digits, fashion_mnist


def test_digits_are_split_without_overlap_and_evenly():
    data = digits()
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [1077, 360, 360]
    assert data.train[0].shape[1:] == (1, 8, 8)
    images = [images.flatten(1) for images, _ in (data.train, data.validation, data.test)]
    pixels = torch.cat(images)
    assert ((pixels.min(), pixels.max()), len(pixels.unique(dim=0))) == ((0, 1), 1797)
    for _, labels in (data.train, data.validation, data.test):
        assert (torch.bincount(labels) / len(labels)).min() > 0.09
    assert torch.equal(digits().test[1], data.test[1])
    assert not torch.equal(digits(seed=1).test[1], data.test[1])
    train, test = data.train, data.test
    nearest = torch.cdist(test[0].flatten(1), train[0].flatten(1)).argmin(1)
    assert (train[1][nearest] == test[1]).float().mean() > 0.97  # labels belong to images


def write_idx(folder: Path, train=40, test=20):
    rng = np.random.default_rng(0)
    for name, number in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (number, 28, 28), np.uint8)
        labels = (np.arange(number) % 10).astype(np.uint8)
        images[:, 0, 0] = labels
        header = np.array([2051, number, 28, 28], ">i4").tobytes()
        path = folder / f"{name}-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(header + images.tobytes()))
        header = np.array([2049, number], ">i4").tobytes()
        path = folder / f"{name}-labels-idx1-ubyte.gz"
        path.write_bytes(gzip.compress(header + labels.tobytes()))


def test_idx_files_are_read_and_validation_is_taken_from_training(tmp_path):
    write_idx(tmp_path)
    data = fashion_mnist(tmp_path, validation=10)
    parts = (data.train, data.validation, data.test)
    assert [len(labels) for _, labels in parts] == [30, 10, 20]
    for images, labels in parts:
        assert images.shape[1:] == (1, 28, 28)
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
    assert data.validation[1].sort().values.tolist() == list(range(10))


def test_faulty_idx_files_are_refused(refuses, tmp_path):
    refuses(
        GatesError,
        ("cannot be read: No such file", lambda: fashion_mnist(tmp_path)),
        (
            "install the Debian package dataset-fashion-mnist",
            lambda: fashion_mnist(tmp_path / "nowhere"),
        ),
    )
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for content, words in (
        (b"no gzip", "cannot be read"),
        (gzip.compress(b"short"), "is not an idx file of 3 dimensions"),
        (
            gzip.compress(np.array([2049, 1, 28, 28], ">i4").tobytes() + bytes(784)),
            "is not an idx file",
        ),
        (
            gzip.compress(np.array([2051, 2, 28, 28], ">i4").tobytes() + bytes(784)),
            "is not an idx file",
        ),
    ):
        write_idx(tmp_path)
        path.write_bytes(content)
        refuses(GatesError, (words, lambda: fashion_mnist(tmp_path)))
    write_idx(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    refuses(GatesError, ("cannot be read", lambda: fashion_mnist(tmp_path)))


def test_fashion_mnist_of_debian():
    if not Path(FASHION_FOLDER).is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = fashion_mnist()
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [
        50_000,
        10_000,
        10_000,
    ]
    assert torch.bincount(data.validation[1]).tolist() == [1000] * 10
    assert torch.bincount(data.test[1]).tolist() == [1000] * 10
    assert data.train[0].mean() == pytest.approx(0.286, abs=0.002)  # known of the training part
