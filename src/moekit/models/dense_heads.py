"""Heads that answer at each patch of a picture: boxes of things, and a class for each pixel.

Shape legend: B examples, P patches of one stem, C classes, M boxes of the fullest example, H and W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.errors import require
from moekit.config.task_vision import DetectHeadConfig, SegmentHeadConfig
from moekit.models.boxes import generalised_iou
from moekit.models.task_heads import IGNORED, Head, Hidden, register_head

# share of patches that hold the middle of a thing, before anything is learnt (Lin et al. 2017, arXiv:1708.02002)
PRIOR = 0.02
# sizes are learnt as logarithms of the typical one, within these bounds
LARGEST_LOG = 3.0


@register_head("detect")
class DetectHead(Head):
    """A box from each patch: the patch that holds the middle of a thing says where it is and what.

    Answer `[B, P, 5 + C]`: logit of there being a thing, its box y, x, height, width in pixels, logits of its class.
    Targets `[B, M, 5]`: y, x, height, width and the number of the class; height 0 where there is no further box.

    One stage and no anchors, as in YOLO (Redmon et al. 2016, arXiv:1506.02640) and FCOS (Tian et al. 2019,
    arXiv:1904.01355): focal loss over all patches, generalised IoU and cross-entropy over those with a thing.
    """

    reads_pooled = False

    centres: Tensor
    typical: Tensor

    def __init__(self, config: DetectHeadConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.map = nn.Linear(d_model, 5 + len(config.labels))
        with torch.no_grad():
            self.map.weight[:5] *= 0.1  # boxes start at their patch and at the typical size
            self.map.bias[:5] = 0.0
            self.map.bias[0] = math.log(PRIOR / (1 - PRIOR))
        rows, columns = config.grid
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        self.register_buffer("centres", (grid + 0.5) * config.patch, persistent=False)
        self.register_buffer("typical", torch.tensor(config.typical), persistent=False)

    def answer(self, hidden: Hidden) -> Tensor:
        raw = self.map(patches_of(hidden, self.config.stem, self.config.grid)).float()
        middle = self.centres + self.config.patch * raw[..., 1:3]
        size = self.typical * raw[..., 3:5].clamp(-LARGEST_LOG, LARGEST_LOG).exp()
        return torch.cat([raw[..., :1], middle - size / 2, size, raw[..., 5:]], dim=-1)

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        owner = self.owners(targets)
        example, patch = torch.nonzero(owner >= 0, as_tuple=True)
        wanted = targets[example, owner[example, patch]]
        said = answer[example, patch]
        found = focal_loss(answer[..., 0], (owner >= 0).to(answer.dtype)).sum()
        box = (1 - generalised_iou(said[:, 1:5], wanted[:, :4])).sum()
        kind = F.cross_entropy(said[:, 5:], wanted[:, 4].long(), ignore_index=IGNORED, reduction="sum")
        return (found + box + kind) / max(len(wanted), 1), len(targets)

    def owners(self, targets: Tensor) -> Tensor:
        """`[B, P]`: which of an example's M boxes has its middle in the patch, the smallest of several; -1 for none."""
        rows, columns = self.config.grid
        middle = (targets[..., :2] + targets[..., 2:4] / 2) / self.config.patch
        row, column = middle[..., 0].long().clamp(0, rows - 1), middle[..., 1].long().clamp(0, columns - 1)
        area = targets[..., 2] * targets[..., 3]
        owner = torch.full((len(targets), rows * columns), -1, device=targets.device)
        examples = torch.arange(len(targets), device=targets.device)
        # from the largest to the smallest, which has the last word; empty ones say nothing
        for place in area.argsort(dim=1, descending=True, stable=True).unbind(dim=1):
            here = (row * columns + column)[examples, place]
            real = area[examples, place] > 0
            owner[examples[real], here[real]] = place[real]
        return owner


def focal_loss(logits: Tensor, wanted: Tensor, gamma: float = 2.0) -> Tensor:
    """Binary cross-entropy of each, times (1 - probability of the truth) ** gamma: what is easy weighs little.

    Lin et al. 2017, arXiv:1708.02002.

    >>> round(focal_loss(torch.zeros(1), torch.ones(1)).item() / math.log(2), 6)
    0.25
    """
    plain = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return plain * (1 - (-plain).exp()) ** gamma


@register_head("segment")
class SegmentHead(Head):
    """Logits `[B, C, H, W]` of each pixel's class from its patch; targets `[B, H, W]`, -100 where unknown.

    With `refine`, each patch gives so many features of its pixels, and a convolution over these and the picture itself
    gives the logits: what a patch cannot hold of edges comes from the pixels, as through the skips of a U-Net
    (Ronneberger et al. 2015, arXiv:1505.04597).
    """

    reads_pooled = False

    def __init__(self, config: SegmentHeadConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        width = config.refine or config.classes
        self.map = nn.Linear(d_model, width * config.patch**2)
        self.refine = (
            nn.Conv2d(width + config.channels, config.classes, 3, padding=1) if config.refine else None
        )

    def answer(self, hidden: Hidden) -> Tensor:
        rows, columns = self.config.grid
        x = self.map(patches_of(hidden, self.config.stem, self.config.grid))
        pixels = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, columns)), self.config.patch)
        if self.refine is None:
            return pixels.float()
        image = hidden.inputs[self.config.stem]["pixels"].to(pixels.dtype)
        logits: Tensor = self.refine(torch.cat([F.gelu(pixels), image], dim=1))
        return logits.float()

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        known = int((targets != IGNORED).sum())
        total = F.cross_entropy(answer, targets, ignore_index=IGNORED, reduction="sum")
        return total / max(known, 1), known


def patches_of(hidden: Hidden, stem: str, grid: tuple[int, int]) -> Tensor:
    """`[B, P, D]` of one stem. Errors: `ConfigError` where it has not as many tokens as the grid has patches."""
    place = hidden.places[stem]
    found = place.stop - place.start
    require(found == grid[0] * grid[1], "the head's stem", stem,
            f"must give a token for each of {grid[0]} x {grid[1]} patches; it gives {found}")  # fmt: skip
    return hidden.x[:, place]
