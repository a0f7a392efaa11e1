"""A column of pictures as codes of their patches, for pictures that are generated.

Shape legend: N examples, P patches of a picture, K codes, V values of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from moekit.config.errors import DataError, MissingExtraError
from moekit.config.task_vision import CodesHeadConfig, CodesTarget
from moekit.data.encoding.base import Arrays, Encoded
from moekit.data.encoding.signals import stacked_images
from moekit.data.encoding.targets import TargetEncoder
from moekit.data.examples import Examples

# patches that the codebook is fitted to, and patches whose distances are held at once
_SAMPLE, _AT_ONCE = 200_000, 65_536


class CodesEncoder(TargetEncoder):
    """The nearest of K patches for each patch of a picture; a generated picture is put together of them.

    The K patches are the centres of k-means over the training patches. In a loss, answers are logits; generated ones
    are codes `[B, P]`, and the prediction is the picture.
    """

    kind = "codes"

    def __init__(self, config: CodesTarget, shape: Sequence[int], whole: bool, centres: np.ndarray) -> None:
        self.config, self.shape, self.whole = config, tuple(shape), whole
        self.centres = centres.astype(np.float32)

    @classmethod
    def fit(cls, config: CodesTarget, train: Examples) -> CodesEncoder:
        images = stacked_images(train, config.column, None)
        for side, size in zip(("height", "width"), images.shape[1:3], strict=True):
            if size % config.patch:
                raise DataError(
                    f"column {config.column!r}: {side} {size} is no multiple of patch ({config.patch})"
                )
        patches = cut(images, config.patch).reshape(-1, config.patch**2 * images.shape[-1])
        rng = np.random.Generator(np.random.PCG64([0, 6]))
        sample = patches[rng.permutation(len(patches))[:_SAMPLE]].astype(np.float32)
        if len(np.unique(sample, axis=0)) < config.codes:
            raise DataError(
                f"column {config.column!r} holds fewer than {config.codes} different patches. Lower codes"
            )
        return cls(config, images.shape[1:], images.dtype.kind in "iu", _centres(sample, config.codes))

    def part(self) -> CodesHeadConfig:
        rows, columns = self.shape[0] // self.config.patch, self.shape[1] // self.config.patch
        return CodesHeadConfig(
            codes=self.config.codes, length=rows * columns, temperature=self.config.temperature,
            top_p=self.config.top_p, weight=self.config.weight,
        )  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        return Arrays(targets=self.codes(stacked_images(examples, self.config.column, self.shape)))

    def codes(self, images: np.ndarray) -> np.ndarray:
        """`[N, P]` int64: the nearest code of each patch, row by row."""
        patches = cut(images, self.config.patch)
        flat = patches.reshape(-1, patches.shape[-1])
        own = (self.centres**2).sum(axis=1) / 2
        found = [
            (own - flat[start : start + _AT_ONCE].astype(np.float32) @ self.centres.T).argmin(axis=1)
            for start in range(0, len(flat), _AT_ONCE)
        ]
        return (
            np.concatenate(found).reshape(patches.shape[:2])
            if found
            else np.zeros(patches.shape[:2], np.int64)
        )

    def images(self, codes: np.ndarray) -> np.ndarray:
        """Pictures `[N, H, W, C]` put together of codes `[N, P]`; bytes where the column holds whole numbers."""
        height, width, channels = self.shape
        p = self.config.patch
        blocks = self.centres[codes].reshape(-1, height // p, width // p, p, p, channels)
        found = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)
        return np.clip(np.rint(found), 0, 255).astype(np.uint8) if self.whole else found

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        codes = answer[row].numpy()
        height, width, _ = self.shape
        return {"prediction": self.images(codes[None])[0].tolist(), "codes": codes.tolist(),
                "text": f"a picture of {height} x {width} pixels"}  # fmt: skip

    def raw(self, answer: Tensor, row: int, said: Mapping[str, Any]) -> Any:
        return self.images(answer[row : row + 1].numpy())[0]

    def truth(self, examples: Examples) -> np.ndarray:
        return stacked_images(examples, self.config.column, self.shape)

    def state(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "whole": self.whole, "centres": self.centres.tolist()}

    @classmethod
    def from_state(cls, config: CodesTarget, state: Mapping[str, Any]) -> CodesEncoder:
        return cls(config, state["shape"], state["whole"], np.asarray(state["centres"], np.float32))


def cut(images: np.ndarray, patch: int) -> np.ndarray:
    """Patches `[N, P, patch * patch * C]` of pictures `[N, H, W, C]`, row by row.

    >>> cut(np.arange(8).reshape(1, 2, 4, 1), 2).tolist()
    [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    n, height, width, channels = images.shape
    blocks = images.reshape(n, height // patch, patch, width // patch, patch, channels)
    rows, columns = height // patch, width // patch
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, patch * patch * channels)


def _centres(sample: np.ndarray, n: int) -> np.ndarray:
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise MissingExtraError(
            "targets of kind codes need scikit-learn. Install it: pip install 'moekit[tasks]'"
        ) from None
    fitted = MiniBatchKMeans(n, batch_size=4096, n_init=1, max_iter=100, random_state=0).fit(sample)
    return np.asarray(fitted.cluster_centers_)
