"""How good generated pictures are: a judge trained on real ones says what it sees, and how far both lie apart.

Shape legend: N pictures, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.errors import require

_BATCH = 128
_FEATURES = 64


class Judge:
    """A small convolutional classifier of pictures, trained on real ones; never part of what it judges.

    Attributes: labels: names of the classes, sorted.

    >>> images = np.zeros((64, 8, 8, 1), np.uint8)
    >>> images[32:] = 255
    >>> judge = Judge(images, ["dark"] * 32 + ["bright"] * 32, steps=20)
    >>> judge.says(images[[0, 63]])[0]
    ['dark', 'bright']
    """

    def __init__(
        self, images: np.ndarray, labels: Sequence[str], steps: int | None = None, seed: int = 0
    ) -> None:
        """Train on pictures `[N, H, W, C]` of bytes with sides of at least 4, and the class of each.

        steps: of training; where None, ten passes over the pictures, but 100 steps at least and 600 at most.
        """
        self.labels = sorted(set(labels))
        numbers = torch.tensor([self.labels.index(label) for label in labels])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = _network(images.shape, len(self.labels))
            per_epoch = -(-len(images) // _BATCH)
            steps = min(max(10 * per_epoch, 100), 600) if steps is None else steps
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=2e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            order = torch.cat([torch.randperm(len(images)) for _ in range(-(-steps * _BATCH // len(images)))])
            for step in range(steps):
                rows = order[step * _BATCH : (step + 1) * _BATCH]
                loss = F.cross_entropy(self.net(_tensor(images[rows.numpy()])), numbers[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self.net.eval()

    @torch.inference_mode()
    def says(self, images: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The class of each picture, and its features `[N, F]`: what the last linear map reads."""
        found = [
            self.net[:-1](_tensor(images[start : start + _BATCH])) for start in range(0, len(images), _BATCH)
        ]
        features = torch.cat(found)
        best = self.net[-1](features).argmax(dim=1).tolist()
        return [self.labels[number] for number in best], features.numpy()


def _network(shape: Sequence[int], n: int) -> nn.Sequential:
    height, width, channels = shape[1:]
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), _FEATURES), nn.ReLU(), nn.Dropout(0.3), nn.Linear(_FEATURES, n),
    )  # fmt: skip


def _tensor(images: np.ndarray) -> Tensor:
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared distance of two Gaussians fitted to features `[N, F]` and `[M, F]`: 0 where mean and spread are equal.

    |m - n|^2 + trace(S + T - 2 (S T)^(1/2)), as Heusel et al. 2017 (arXiv:1706.08500) compare generated pictures with
    real ones. The features are not those of Inception here, so figures of other judges mean something else; it grows
    where N or M are small.

    Errors: `ConfigError` for fewer than two examples on a side.

    >>> near, far = np.array([[0.0], [2.0]]), np.array([[10.0], [14.0]])
    >>> round(frechet_distance(near, far), 6)      # means 1 and 12, deviations 2 ** 0.5 and 8 ** 0.5
    123.0
    """
    for features in (first, second):
        require(len(features) >= 2, "features", features.shape, "must have at least two rows")
    one, other = (np.asarray(features, np.float64) for features in (first, second))
    cov_one, cov_other = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (one, other))
    # S T has the eigenvalues of the symmetric root(S) T root(S)
    values, vectors = np.linalg.eigh(cov_one)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_other @ root), 0, None)).sum()
    between = ((one.mean(axis=0) - other.mean(axis=0)) ** 2).sum()
    return float(max(between + np.trace(cov_one) + np.trace(cov_other) - 2 * shared, 0.0))
