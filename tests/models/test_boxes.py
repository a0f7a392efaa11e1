"""Boxes: overlaps worked out by hand, and which of many stay."""

from __future__ import annotations

import numpy as np
import torch

from moekit.models.boxes import generalised_iou, kept_boxes, pairwise_iou


def test_overlaps_by_hand():
    one = np.array([[0, 0, 4, 2], [10, 10, 1, 1]])
    other = np.array([[2, 0, 4, 2], [0, 0, 4, 2], [0, 2, 4, 2]])
    # the first two share 2 x 2 of 8 + 8 - 4; boxes that touch share nothing
    np.testing.assert_allclose(pairwise_iou(one, other), [[4 / 12, 1, 0], [0, 0, 0]])
    assert pairwise_iou(np.zeros((0, 4)), other).shape == (0, 3)
    assert pairwise_iou(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]


def test_generalised_overlap_by_hand_and_its_slope_where_boxes_lie_apart():
    first = torch.tensor([[0.0, 0, 4, 2], [0, 0, 4, 2], [0, 0, 2, 2]], requires_grad=True)
    second = torch.tensor([[2.0, 0, 4, 2], [0, 0, 4, 2], [4, 0, 2, 2]])
    # around the first pair: 6 x 2, all of it covered; around the last: 6 x 2, of which 4 are empty
    found = generalised_iou(first, second)
    torch.testing.assert_close(found.detach(), torch.tensor([4 / 12, 1.0, 0 - 4 / 12]))
    found[2].backward()
    assert first.grad[2, 0] > 0  # moving down brings it nearer
    plain = torch.from_numpy(pairwise_iou(first.detach().numpy(), second.numpy())).diagonal()
    assert bool((found.detach() <= plain + 1e-6).all())


def test_a_worse_box_on_the_same_thing_goes():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 10, 10], [0, 0, 10, 10], [20, 20, 5, 5], [5, 0, 10, 10]])
    scores, labels = np.array([0.6, 0.9, 0.5, 0.1, 0.4]), np.array([0, 0, 1, 0, 0])
    # 1 beats 0 (9/11 shared); 2 has another label; 4 shares 6 of 14 with 1
    assert kept_boxes(boxes, scores, labels).tolist() == [1, 2, 4, 3]
    assert kept_boxes(boxes, scores, labels, iou=0.4).tolist() == [1, 2, 3]
    assert kept_boxes(np.zeros((0, 4)), np.zeros(0), np.zeros(0)).tolist() == []
