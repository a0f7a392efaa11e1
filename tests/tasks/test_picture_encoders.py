"""Columns of clips, boxes, masks, pictures and transcripts: what becomes of them, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError, DataError
from moekit.config.task import ImageInput
from moekit.config.task_run import TaskRunConfig
from moekit.config.task_transcript import TranscriptTarget
from moekit.config.task_vision import BoxesTarget, CodesTarget, MaskTarget, VideoInput
from moekit.data.encoding.codebook import CodesEncoder
from moekit.data.encoding.pictures import BoxesEncoder, MaskEncoder, VideoEncoder
from moekit.data.encoding.signals import ImageEncoder
from moekit.data.encoding.transcripts import TranscriptEncoder
from moekit.data.encoding.whole import Encoding
from moekit.data.examples import Examples
from moekit.data.task_data import columns_of
from moekit.models.dense_heads import DetectHead
from moekit.models.task_heads import Hidden

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 12, 1)).astype(np.uint8)
BOXES = [[[0, 0, 4, 4], [4, 8, 2, 2]], [], [[2, 2, 4, 8]], [[0, 0, 8, 12]]]
LABELS = [["b", "a"], [], ["a"], ["a"]]
EXAMPLES = Examples({"image": IMAGES, "boxes": BOXES, "labels": LABELS})


def again(encoder, config):
    return type(encoder).from_state(config, json.loads(json.dumps(encoder.state())))


def test_boxes_become_numbers_and_come_back():
    config = BoxesTarget(threshold=0.5)
    encoder = again(BoxesEncoder.fit(config, EXAMPLES), config)
    targets = encoder.encode(EXAMPLES).batch(np.array([0, 1, 2]))["targets"]
    assert targets.tolist() == [
        [[0, 0, 4, 4, 1], [4, 8, 2, 2, 0]], [[0] * 5] * 2, [[2, 2, 4, 8, 0], [0] * 5],
    ]  # fmt: skip
    assert encoder.encode(EXAMPLES).batch(np.array([1]))["targets"].shape == (1, 0, 5)
    # the geometric mean of 4, 2, 4, 8 and of 4, 2, 8, 12
    assert encoder.typical == pytest.approx([4.0, 768**0.25])
    part = encoder.part_beside({"image": ImageEncoder.fit(ImageInput(patch=4), EXAMPLES)})
    assert (part.grid, part.labels, part.stem) == ((2, 3), ("a", "b"), "image")
    # a head that says exactly the targets: its answer in the user's words are the user's boxes
    answer = torch.zeros(1, 6, 7)
    answer[..., 0] = -9
    for patch, box, kind in [(0, [0, 0, 4, 4], 1), (5, [4, 8, 2, 2], 0)]:
        answer[0, patch] = torch.tensor([9.0, *box, *(9.0 * (kind == place) for place in range(2))])
    # again in the patch beside, a little worse and a little moved; and one that is unsure
    answer[0, 1] = torch.tensor([3.0, 0, 0.5, 4, 4, 0, 9])
    answer[0, 3] = torch.tensor([-2.0, 0, 0, 2, 2, 9, 0])
    said = encoder.answers(answer, 0)["prediction"]
    assert [(each["box"], each["label"]) for each in said] == [([0, 0, 4, 4], "b"), ([4, 8, 2, 2], "a")]
    assert all(each["score"] > 0.99 for each in said)
    every = encoder.raw(answer, 0, {})
    assert [each["label"] for each in every] == ["b", "a", "a"]
    assert 0.1 < every[2]["score"] < 0.13
    json.dumps(said)
    assert encoder.truth(EXAMPLES)[0][1] == {"box": [4, 8, 2, 2], "label": "a"}


def test_the_head_that_belongs_to_the_boxes_owns_them_where_they_lie():
    encoder = BoxesEncoder.fit(BoxesTarget(), EXAMPLES)
    head = DetectHead(encoder.part_beside({"image": ImageEncoder.fit(ImageInput(patch=4), EXAMPLES)}), 4)
    targets = encoder.encode(EXAMPLES).batch(np.arange(4))["targets"]
    assert (head.owners(targets) >= 0).sum(dim=1).tolist() == [2, 0, 1, 1]
    answer = head.answer(Hidden(torch.zeros(1, 6, 4), None, torch.zeros(1, 4), {"image": slice(0, 6)}, {}))
    # at first, each patch has the typical box in its middle
    torch.testing.assert_close(answer[0, 0, 3:5].detach(), torch.tensor(encoder.typical))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("boxes", [[[0, 0, 4]], [], [], []], r"example 1, column 'boxes': must hold a list of boxes \[y, x"),
        ("boxes", [[[0, 0, 4, 0], [0, 0, 1, 1]], [], [], []], "height and width above 0"),
        ("boxes", [["no"] * 2, [], [], []], "example 1, column 'boxes'"),
        ("labels", [["a"], [], ["a"], ["a"]], "example 1, column 'labels': must hold .* one for each of 2 boxes"),
        ("labels", ["ab", [], ["a"], ["a"]], "example 1, column 'labels'"),
    ],
)  # fmt: skip
def test_boxes_that_are_none_are_refused(column, values, message):
    columns = {**EXAMPLES.columns, column: values}
    if column == "boxes":
        columns["labels"] = [["a"] * len(each) for each in values]
    with pytest.raises(DataError, match=message):
        BoxesEncoder.fit(BoxesTarget(), Examples(columns)).encode(Examples(columns))


def test_masks_keep_their_classes():
    masks = (np.arange(4 * 96).reshape(4, 8, 12) % 3).astype(np.uint8)
    examples = Examples({"image": IMAGES, "mask": masks})
    config = MaskTarget(refine=5)
    encoder = again(MaskEncoder.fit(config, examples), config)
    part = encoder.part_beside({"image": ImageEncoder.fit(ImageInput(patch=4), examples)})
    assert (part.classes, part.channels, part.refine, part.grid) == (3, 1, 5, (2, 3))
    other = Examples({"mask": [mask.tolist() for mask in masks.astype(int) - (masks == 2) * 3]})
    targets = encoder.encode(other).batch(np.arange(4))["targets"]
    assert torch.equal(targets == -100, torch.from_numpy(masks == 2))
    assert (encoder.truth(other) == -1).sum() == (masks == 2).sum()
    answer = torch.nn.functional.one_hot(torch.from_numpy(masks).long()).permute(0, 3, 1, 2).float()
    assert (encoder.raw(answer, 2, {}) == masks[2]).all()
    said = encoder.answers(answer, 2)
    assert said["prediction"] == masks[2].tolist()
    assert sum(said["shares"].values()) == pytest.approx(1)
    with pytest.raises(DataError, match=r"must have the shape \(8, 12\); got \(8, 11\)"):
        encoder.encode(Examples({"mask": masks[:, :, 1:]}))
    with pytest.raises(DataError, match=r"column 'mask': must hold \[height, width\] of whole numbers"):
        MaskEncoder.fit(config, Examples({"mask": masks / 2}))
    with pytest.raises(DataError, match="at least two classes of pixels; got 1"):
        MaskEncoder.fit(config, Examples({"mask": masks * 0}))
    with pytest.raises(DataError, match="masks of the pictures' size, 8 x 12; got 8 x 8"):
        MaskEncoder.fit(config, Examples({"mask": masks[:, :, :8]})).part_beside(
            {"image": ImageEncoder.fit(ImageInput(patch=4), examples)}
        )


def test_what_lies_in_pixels_needs_pixels_that_stay():
    def made(inputs, targets):
        return TaskRunConfig.from_dict({"inputs": inputs, "targets": targets})

    boxes = {"things": {"kind": "boxes", "input": "image"}}
    still = {"image": {"kind": "image"}}
    assert columns_of(made(still, boxes)) == ["image", "boxes", "labels"]
    for change in ({"shift": 1}, {"flip": True}):
        with pytest.raises(ConfigError, match=r"inputs\.image cannot be set: the answers would not move"):
            made({"image": {"kind": "image", **change}}, boxes)
    with pytest.raises(
        ConfigError, match=r"targets.things.input must be an input of kind image; got 'image'"
    ):
        made({"text": {"kind": "text"}}, boxes)
    with pytest.raises(ConfigError, match="must be an input of kind audio, text or video; got 'sound'"):
        made(still, {"words": {"kind": "transcript"}})


def test_clips_are_standardised_and_their_sizes_kept():
    clips = np.random.default_rng(1).integers(0, 256, (5, 4, 8, 8)).astype(np.uint8)
    config = VideoInput(patch=4, frames=2)
    encoder = again(VideoEncoder.fit(config, Examples({"clip": clips})), config)
    part = encoder.part()
    assert (part.n_patches, part.length, part.channels) == (8, 4, 1)
    batch = encoder.encode(Examples({"clip": clips})).batch(np.array([3, 1]))["clips"]
    assert batch.shape == (2, 4, 1, 8, 8)
    every = encoder.encode(Examples({"clip": clips})).batch(np.arange(5))["clips"]
    assert float(every.mean()) == pytest.approx(0, abs=1e-4)
    assert float(every.std()) == pytest.approx(1, abs=1e-2)
    torch.testing.assert_close(batch[0], every[3])
    with pytest.raises(DataError, match=r"clips of shape \(4, 8, 8, 1\), as in training; got \(3, 8, 8, 1\)"):
        encoder.encode(Examples({"clip": clips[:, :3]}))
    with pytest.raises(DataError, match="example 2, column 'clip': every clip must have the shape"):
        VideoEncoder.fit(config, Examples({"clip": [clips[0], clips[1, :2]]}))
    with pytest.raises(DataError, match=r"must hold clips \[frames, height, width\]"):
        VideoEncoder.fit(config, Examples({"clip": clips[:, 0]}))


def test_pictures_become_codes_and_come_back():
    pytest.importorskip("sklearn")
    # every patch is one of three: the codebook is exact
    rng = np.random.default_rng(2)
    tiles = rng.integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
    which = rng.integers(0, 3, (20, 2, 3))
    images = tiles[which].transpose(0, 1, 3, 2, 4, 5).reshape(20, 8, 12, 1)
    examples = Examples({"image": images})
    config = CodesTarget(codes=3)
    encoder = again(CodesEncoder.fit(config, examples), config)
    codes = encoder.encode(examples).batch(np.arange(20))["targets"]
    assert codes.shape == (20, 6)
    assert len({(a, b) for a, b in zip(codes.flatten().tolist(), which.ravel().tolist(), strict=True)}) == 3
    assert (encoder.images(codes.numpy()) == images).all()
    assert (encoder.raw(codes, 7, {}) == images[7]).all()
    said = encoder.answers(codes, 7)
    assert np.asarray(said["prediction"]).shape == (8, 12, 1)
    assert said["codes"] == codes[7].tolist()
    assert encoder.part().length == 6
    with pytest.raises(DataError, match=r"fewer than 4 different patches\. Lower codes"):
        CodesEncoder.fit(CodesTarget(codes=4), examples)
    with pytest.raises(DataError, match=r"width 12 is no multiple of patch \(8\)"):
        CodesEncoder.fit(CodesTarget(codes=2, patch=8), examples)


def test_pictures_are_not_read_in_prediction():
    pytest.importorskip("sklearn")
    config = TaskRunConfig.from_dict({
        "inputs": {"asked": {"kind": "ids", "columns": ["label"]}},
        "targets": {"picture": {"kind": "codes", "patch": 4, "codes": 3}},
    })  # fmt: skip
    train = Examples({"image": IMAGES, "label": ["x", "y", "x", "y"]})
    encoding = Encoding.fit(config.inputs, config.targets, train)
    assert encoding.encode(Examples({"label": ["y"]}), targets=False).inputs["asked"].batch(np.array([0]))


def test_transcripts_become_numbers_from_one_and_come_back():
    config = TranscriptTarget(column="said")
    train = Examples({"said": [["two", "one"], "three two", []]})
    encoder = again(TranscriptEncoder.fit(config, train), config)
    assert encoder.labels == ["one", "three", "two"]
    assert encoder.encode(train).batch(np.arange(3))["targets"].tolist() == [[3, 1], [2, 3], [-100, -100]]
    other = Examples({"said": [["one", "four", "one"]]})
    assert encoder.encode(other).batch(np.array([0]))["targets"].tolist() == [[1, 1]]
    assert encoder.truth(other) == ["one four one"]
    answer = torch.eye(4)[torch.tensor([[0, 3, 3, 0, 3, 1]])] * 9
    for beam in (1, 4):
        made = TranscriptEncoder(config.replace(beam=beam), encoder.labels)
        assert made.answers(answer, 0)["prediction"] == "two two one"
    with pytest.raises(DataError, match="example 1, column 'said': must hold a list of labels; got 7"):
        encoder.encode(Examples({"said": [7]}))
    with pytest.raises(DataError, match="must hold labels without spaces"):
        encoder.encode(Examples({"said": [["one two"]]}))
    with pytest.raises(DataError, match="column 'said' holds no labels"):
        TranscriptEncoder.fit(config, Examples({"said": [[], ""]}))
