"""Images: the idx format byte by byte, and grey levels that come back exactly."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pytest
from source_samples import fetcher_of

from moekit.config.errors import DataError
from moekit.data.task_sources.images import fashion_mnist, mnist_10k, read_digits, read_idx


def idx(array: np.ndarray) -> bytes:
    head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(struct.pack(">I", size) for size in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def test_an_idx_file_written_by_hand() -> None:
    # two axes of 2 and 3, most significant byte first
    data = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 250])
    assert read_idx(gzip.compress(data), "x").tolist() == [[1, 2, 3], [4, 5, 250]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"plain", "x is not a gzip file"),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 2]))[:-9], "x is not a gzip file"),
        (gzip.compress(b"\0\0\x0d\1\0\0\0\1\0\0\0\0"), "starts with 00 00 0d 01"),
        (gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 2])), "not an idx file of bytes"),
        (
            gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2])),
            r"holds 2 values where its head announces \(3,\)",
        ),
    ],
)
def test_other_files_are_refused(data, message) -> None:
    with pytest.raises(DataError, match=message):
        read_idx(data, "x")


def test_clothes_in_their_given_parts(tmp_path) -> None:
    folder = "usr/share/datasets/fashion-mnist"
    train, test = np.arange(3 * 784).reshape(3, 28, 28) % 256, np.full((1, 28, 28), 9)
    data = fashion_mnist(
        fetcher_of(
            tmp_path,
            {
                "dataset-fashion-mnist": {
                    f"{folder}/train-images-idx3-ubyte.gz": idx(train),
                    f"{folder}/train-labels-idx1-ubyte.gz": idx(np.array([9, 0, 3])),
                    f"{folder}/t10k-images-idx3-ubyte.gz": idx(test),
                    f"{folder}/t10k-labels-idx1-ubyte.gz": idx(np.array([1])),
                }
            },
        )
    )
    assert data.train["label"] == ["ankle boot", "t-shirt/top", "dress"]
    assert np.array_equal(data.train["image"][..., 0], train)
    assert data.train["image"].dtype == np.uint8
    assert data.test["label"] == ["trouser"]
    assert data.validation["image"].shape == (0, 28, 28, 1)


def levels(values: np.ndarray) -> str:
    return json.dumps({"data": [round(value / 255, 3) for value in values.reshape(-1).tolist()]})


def test_every_grey_level_survives_its_three_decimals() -> None:
    image = np.arange(784) % 256
    assert np.array_equal(read_digits(levels(image), "0.json").reshape(-1), image)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "not a JSON object with a list of numbers"),
        ("{", "not a JSON object"),
        ('{"data": [0, 1]}', "holds 2 numbers, which are no whole images"),
        ('{"data": []}', "holds 0 numbers"),
        (json.dumps({"data": [0.502] * 783 + [1.2]}), "no grey levels"),
        (json.dumps({"data": [0.0] * 783 + [0.5]}), "no grey levels"),
    ],
)
def test_other_numbers_are_refused(text, message) -> None:
    with pytest.raises(DataError, match=message):
        read_digits(text, "0.json")


def test_digits_in_three_parts_with_all_classes_in_each(tmp_path) -> None:
    files = {
        f"package/src/digits/{digit}.json": levels(
            np.stack([np.full(784, digit * 20 + i) for i in range(20)]) % 256
        )
        for digit in range(10)
    }
    data = mnist_10k(fetcher_of(tmp_path, {"mnist": files}))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [160, 20, 20]
    for part in (data.train, data.validation, data.test):
        assert set(part["label"]) == set("0123456789")
        for image, label in zip(part["image"], part["label"], strict=True):
            assert image[0, 0, 0] // 20 == int(label)
