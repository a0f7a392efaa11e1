"""Boxes `[y, x, height, width]` in pixels: how far they overlap, and which of many are kept.

Shape legend: N and M boxes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`[N, M]`: intersection over union of each of `[N, 4]` with each of `[M, 4]`; 0 where both are empty.

    >>> pairwise_iou(np.array([[0, 0, 2, 2]]), np.array([[0, 0, 2, 2], [1, 0, 2, 2], [5, 5, 1, 1]])).round(2).tolist()
    [[1.0, 0.33, 0.0]]
    """
    one, other = _float(first)[:, None], _float(second)[None]
    low = np.maximum(one[..., :2], other[..., :2])
    high = np.minimum(one[..., :2] + one[..., 2:], other[..., :2] + other[..., 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    union = one[..., 2:].prod(axis=-1) + other[..., 2:].prod(axis=-1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    """`[N]` in -1..1 for boxes `[N, 4]`, pair by pair: IoU less the empty share of the box around both.

    Unlike IoU it has a slope where two boxes lie apart (Rezatofighi et al. 2019, arXiv:1902.09630).

    >>> apart = generalised_iou(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[0.0, 3, 1, 1]]))
    >>> apart.item()                                # the box around both is 4 wide, half of it holds neither
    -0.5
    """
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(_end(first), _end(second))
    shared = (high - low).clamp(min=0).prod(dim=1)
    union = first[:, 2:].prod(dim=1) + second[:, 2:].prod(dim=1) - shared
    around = torch.maximum(_end(first), _end(second)) - torch.minimum(first[:, :2], second[:, :2])
    whole = around.prod(dim=1).clamp(min=1e-9)
    return shared / union.clamp(min=1e-9) - (whole - union) / whole


def kept_boxes(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, iou: float = 0.5) -> np.ndarray:
    """Places of the boxes that stay, best score first: one goes where a better one of its label overlaps it by more.

    Greedy non-maximum suppression.

    Args:
        boxes: `[N, 4]`.
        scores, labels: `[N]`.
        iou: the overlap from which the worse one goes.

    >>> boxes = np.array([[0, 0, 4, 4], [0, 1, 4, 4], [0, 0, 4, 4]])
    >>> kept_boxes(boxes, np.array([0.5, 0.9, 0.8]), np.array([0, 0, 1])).tolist()
    [1, 2]
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    overlap = pairwise_iou(boxes, boxes)
    stays: list[int] = []
    for place in order.tolist():
        if all(labels[place] != labels[other] or overlap[place, other] <= iou for other in stays):
            stays.append(place)
    return np.asarray(stays, dtype=np.int64)


def _float(boxes: np.ndarray) -> np.ndarray:
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def _end(boxes: Tensor) -> Tensor:
    return boxes[:, :2] + boxes[:, 2:]
