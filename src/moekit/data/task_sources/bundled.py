"""Examples that come with scikit-learn: small digits, and measurements of tumours."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import numpy as np

from moekit.config.errors import DataError, MissingExtraError
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.task_sources.base import Fetcher, register_source

TEST_SHARE = 0.2
_SEED = 0
MEASUREMENTS = (
    "radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity", "concave points", "symmetry",
    "fractal dimension",
)  # fmt: skip
_SHA256 = {
    "load_digits": "f6d9e39f37dc45d327f6db33428ee58970ccceabb2535a5c179de35886b70443",
    "load_breast_cancer": "25e2eb7b7a8745b1bde5ba18bc4969983d2e2f403291ecd5bde4a29ef30c3859",
}


@register_source(
    "digits",
    "1,797 written digits of 8 x 8 pixels",
    columns={"image": "grey levels 0 to 255, [8, 8, 1]", "label": "0 to 9"},
    licence="BSD-3-Clause (scikit-learn); CC-BY-4.0 (UCI repository)",
)
def digits(fetch: Fetcher) -> TaskData:
    """A fifth of each digit, drawn with a fixed seed, is tested on. The 17 grey levels are spread over 0 to 255.

    Errors: `MissingExtraError` without scikit-learn.
    """
    images, targets, _, version = _bundled("load_digits")
    examples = Examples(
        {
            "image": np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8),
            "label": [str(target) for target in targets],
        }
    )
    return _split(
        examples,
        version,
        "load_digits",
        "the test part of Optical Recognition of Handwritten Digits, UCI repository, Alpaydin and Kaynak, 1998",
    )


@register_source(
    "breast-cancer",
    "569 tumours, 30 measurements each: malignant or benign",
    columns={
        **{f"mean {name}": "mean over the nuclei of the cells" for name in MEASUREMENTS},
        **{f"{name} error": "standard error of that mean" for name in MEASUREMENTS},
        **{f"worst {name}": "mean of the three largest values" for name in MEASUREMENTS},
        "label": "malignant or benign",
    },
    licence="BSD-3-Clause (scikit-learn); CC-BY-4.0 (UCI repository)",
)
def breast_cancer(fetch: Fetcher) -> TaskData:
    """A fifth of each class, drawn with a fixed seed, is tested on.

    Errors: `MissingExtraError` without scikit-learn.
    """
    values, targets, bunch, version = _bundled("load_breast_cancer")
    columns: dict[str, Any] = {
        str(name): [float(value) for value in values[:, i]] for i, name in enumerate(bunch["feature_names"])
    }
    columns["label"] = [str(bunch["target_names"][target]) for target in targets]
    return _split(
        Examples(columns),
        version,
        "load_breast_cancer",
        "Breast Cancer Wisconsin (Diagnostic), UCI repository, Wolberg, Mangasarian, Street and Street, 1995",
    )


def _split(examples: Examples, version: str, loader: str, described: str) -> TaskData:
    train, test = split_examples(examples, [TEST_SHARE], _SEED, by="label")
    info = SourceInfo(
        name=f"scikit-learn {version}",
        origin=f"bundled with scikit-learn; {described}",
        licence="BSD-3-Clause (scikit-learn); CC-BY-4.0 (the repository of the original)",
        sha256=_SHA256[loader],
        note=f"no parts are given: {TEST_SHARE:.0%} of each class drawn to test on, none to validate; "
        "the hash is that of the numbers",
    )
    return TaskData(train, train.rows([]), test, [info])


def _bundled(loader: str) -> tuple[np.ndarray, np.ndarray, Any, str]:
    """(values, classes, all that the loader gives, version of scikit-learn), checked against their hash."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise MissingExtraError(
            f"the examples of sklearn.datasets.{loader} come with scikit-learn, which is not installed. "
            "Install it: pip install 'moekit[tasks]'"
        ) from None
    bunch = getattr(datasets, loader)()
    values = np.ascontiguousarray(bunch["data"], dtype="<f8")
    targets = np.ascontiguousarray(bunch["target"], dtype="<i8")
    found = hashlib.sha256(values.tobytes() + targets.tobytes()).hexdigest()
    version = importlib.import_module("sklearn").__version__
    if found != _SHA256[loader]:
        raise DataError(
            f"sklearn.datasets.{loader} of scikit-learn {version} does not match its recorded hash: "
            f"expected {_SHA256[loader]}; got {found}"
        )
    return values, targets, bunch, version
