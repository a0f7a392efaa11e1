"""Heads on patches: which patch answers for which box, and that right answers cost nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.task import TaskModelConfig
from moekit.config.task_vision import DetectHeadConfig, SegmentHeadConfig
from moekit.models.dense_heads import DetectHead, SegmentHead
from moekit.models.task_heads import Hidden

GRID = {"stem": "it", "height": 8, "width": 12, "patch": 4}


def detector() -> DetectHead:
    return DetectHead(DetectHeadConfig(labels=("a", "b"), typical=(4.0, 2.0), **GRID), 5)


def hidden(x: torch.Tensor, **inputs: torch.Tensor) -> Hidden:
    return Hidden(x, None, x.mean(dim=1), {"it": slice(0, x.shape[1])}, {"it": inputs})


def test_the_patch_under_the_middle_answers_and_the_smaller_of_two():
    head = detector()
    boxes = torch.tensor([
        # middles (2, 2) -> patch 0; (5, 5) -> row 1, column 1; beyond the border -> the last patch
        [[0.0, 0, 4, 4, 1], [4, 4, 2, 2, 0], [7, 11, 6, 6, 1]],
        # two in patch 0: the smaller one, wherever it stands
        [[0.0, 0, 2, 2, 0], [0, 0, 4, 4, 1], [0, 0, 0, 0, 0]],
        [[0.0] * 5] * 3,
    ])  # fmt: skip
    assert head.owners(boxes).tolist() == [[0, -1, -1, -1, 1, 2], [0] + [-1] * 5, [-1] * 6]
    assert head.owners(boxes[:1, :2]).tolist() == [[0, -1, -1, -1, 1, -1]]
    assert head.owners(boxes[1:2, [1, 0, 2]]).tolist() == [[1, -1, -1, -1, -1, -1]]
    assert head.owners(torch.zeros(2, 0, 5)).tolist() == [[-1] * 6] * 2


def test_what_the_map_says_is_an_offset_and_the_logarithm_of_a_size():
    head = detector()
    with torch.no_grad():
        head.map.weight.zero_()
        head.map.bias.copy_(torch.tensor([2.0, 0.25, -0.5, float(np.log(2)), 0.0, 3.0, 4.0]))
    answer = head.answer(hidden(torch.zeros(1, 6, 5)))
    # the last patch's middle is (6, 10): one pixel down, two to the left; twice the typical height
    torch.testing.assert_close(answer[0, 5].detach(), torch.tensor([2.0, 7 - 4, 8 - 1, 8.0, 2.0, 3.0, 4.0]))


def test_a_right_answer_costs_nothing_and_each_part_counts():
    head = detector()
    boxes = torch.tensor([[[0.0, 0, 4, 4, 1], [4, 8, 2, 2, 0]]])
    right = torch.zeros(1, 6, 7)
    right[..., 0] = -20
    for place, (patch, label) in enumerate([(0, 1), (5, 0)]):
        right[0, patch, 0] = 20
        right[0, patch, 1:5] = boxes[0, place, :4]
        right[0, patch, 5 + label] = 20
    loss, counted = head.loss(right, boxes)
    assert counted == 1
    assert float(loss) == pytest.approx(0, abs=1e-4)
    for patch, field, value in [(3, 0, 5.0), (0, 0, -5.0), (0, 1, 2.0), (5, 3, 4.0), (5, 5, -5.0)]:
        wrong = right.clone()
        wrong[0, patch, field] = value
        assert float(head.loss(wrong, boxes)[0]) > 0.1, (patch, field)
    # patches without a thing answer neither for a box nor for a class
    free = right.clone()
    free[0, 3, 1:] = 7.0
    assert float(head.loss(free, boxes)[0]) == pytest.approx(0, abs=1e-4)
    none, _ = head.loss(right[:, :, :], torch.zeros(1, 0, 5))
    assert torch.isfinite(none)


def test_a_class_that_nobody_knows_costs_its_place_alone():
    head = detector()
    boxes = torch.tensor([[[0.0, 0, 4, 4, -100]]])
    answer = torch.zeros(1, 6, 7)
    answer[..., 0], answer[0, 0, 0] = -20, 20
    answer[0, 0, 1:] = torch.tensor([0.0, 0, 4, 4, 9, -9])
    assert float(head.loss(answer, boxes)[0]) == pytest.approx(0, abs=1e-4)


def test_pixels_stand_where_their_patch_stands():
    head = SegmentHead(SegmentHeadConfig(classes=2, **GRID), 96)
    with torch.no_grad():
        head.map.weight.zero_()
        head.map.bias.copy_(torch.arange(32.0))
        # patch 4 (row 1, column 1) says 100 more in its pixel (2, 3) of class 1
        head.map.weight[16 + 2 * 4 + 3, 4] = 100
    x = torch.zeros(1, 6, 96)
    x[0, 4, 4] = 1
    logits = head.answer(hidden(x))
    assert logits.shape == (1, 2, 8, 12)
    assert logits[0, 1].argmax().item() == (4 + 2) * 12 + 4 + 3
    assert logits[0, 0, :4, :4].flatten().tolist() == list(range(16))


def test_the_convolution_sees_the_pixels():
    torch.manual_seed(0)
    head = SegmentHead(SegmentHeadConfig(classes=3, refine=4, channels=2, **GRID), 6)
    x, pixels = torch.randn(2, 6, 6), torch.randn(2, 2, 8, 12)
    other = pixels.clone()
    other[0, 0, 3, 3] += 1
    with torch.no_grad():
        changed = (head.answer(hidden(x, pixels=pixels)) - head.answer(hidden(x, pixels=other))).abs()
    changed = changed.amax(dim=1)
    rows, columns = torch.nonzero(changed[0] > 0, as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 4, 2, 4)
    assert float(changed[1].max()) == 0


def test_unknown_pixels_cost_nothing():
    head = SegmentHead(SegmentHeadConfig(classes=2, **GRID), 4)
    answer, targets = torch.zeros(2, 2, 8, 12), torch.full((2, 8, 12), -100)
    targets[0, 0, 0] = 1
    loss, counted = head.loss(answer, targets)
    assert (counted, float(loss)) == (1, pytest.approx(np.log(2)))


def test_a_stem_of_another_size_is_refused():
    head = detector()
    with pytest.raises(ConfigError, match=r"token for each of 2 x 3 patches; it gives 5; got 'it'"):
        head.answer(hidden(torch.zeros(1, 5, 5)))
    fields = {"d_model": 8, "n_layers": 1, "n_heads": 2, "stems": {"it": {"kind": "patches"}}}
    for kind in ("detect", "segment", "ctc"):
        with pytest.raises(ConfigError, match=r"heads.answer.stem must be one of the stems: it; got 'other'"):
            TaskModelConfig.from_dict({**fields, "heads": {"answer": {"kind": kind, "stem": "other"}}})
