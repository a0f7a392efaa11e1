"""Images and sounds on their way into a model: what training alters, what it leaves alone, and convolutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.task import AudioInput, ImageInput, PatchStemConfig
from moekit.data.encoding.signals import AudioEncoder, ImageEncoder, with_deltas
from moekit.data.examples import Examples
from moekit.models.task_stems import build_stem

ROWS = np.arange(40)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pixels(train: bool = True, **settings) -> np.ndarray:
    """`[40, 6, 5]`: pictures in which a pixel says where it came from, as numbers from 0 to 29."""
    image = np.arange(30, dtype=np.uint8).reshape(6, 5, 1)
    examples = Examples({"image": np.stack([image] * 40)})
    encoder = ImageEncoder.fit(ImageInput(patch=1, **settings), examples)
    found = encoder.encode(examples).batch(ROWS, rng() if train else None)["pixels"][:, 0].numpy()
    return np.rint(found * encoder.deviation + encoder.mean)


def test_pictures_are_altered_in_training_alone():
    plain = np.arange(30).reshape(6, 5)
    assert (pixels(train=False, shift=2, flip=True, erase=3) == plain).all()
    assert (pixels() == plain).all()


def test_a_moved_picture_is_the_same_elsewhere():
    seen = set()
    for image in pixels(shift=2):
        # the pixel in the middle says by how much
        down, right = np.argwhere(np.arange(30).reshape(6, 5) == image[3, 2])[0] - (3, 2)
        rows, columns = np.clip(np.arange(6) + down, 0, 5), np.clip(np.arange(5) + right, 0, 4)
        assert (image == (rows[:, None] * 5 + columns)).all()
        seen.add((int(down), int(right)))
    assert {down for down, _ in seen} == {right for _, right in seen} == {-2, -1, 0, 1, 2}
    assert len(seen) > 12


def test_half_of_the_pictures_are_mirrored_from_left_to_right():
    plain = np.arange(30).reshape(6, 5)
    mirrored = [(image == plain[:, ::-1]).all() for image in pixels(flip=True)]
    assert 8 < sum(mirrored) < 32
    assert all(
        (image == plain).all() for image, other in zip(pixels(flip=True), mirrored, strict=True) if not other
    )


def test_a_square_is_blanked():
    plain = np.arange(30).reshape(6, 5)
    sizes = set()
    for image in pixels(erase=3):
        rows, columns = np.nonzero(image != plain)
        # the mean, 14.5, stands for nothing
        assert set(image[rows, columns]) <= {14.0}
        sizes.add((len(set(rows)), len(set(columns))))
    assert max(sizes) == (3, 3)
    # less of it at the border, where one row or column may lie outside
    assert {height for height, _ in sizes} == {width for _, width in sizes} == {2, 3}


def test_slopes_over_five_frames():
    frames = np.array([[0.0], [2.0], [4.0], [6.0], [13.0], [13.0]])
    # at the third: (1 * (6 - 2) + 2 * (13 - 0)) / 10; at the first: (1 * (2 - 0) + 2 * (4 - 0)) / 10
    found = with_deltas(frames, 2)
    assert found.shape == (6, 3)
    assert found[2, 1] == pytest.approx(3.0)
    assert found[0, 1] == pytest.approx(1.0)
    assert (with_deltas(np.ones((1, 2)), 2) == [[1, 1, 0, 0, 0, 0]]).all()
    slopes = found[:, 1]
    assert found[2, 2] == pytest.approx(((slopes[3] - slopes[1]) + 2 * (slopes[4] - slopes[0])) / 10)


def sounds(**settings) -> tuple[AudioEncoder, Examples]:
    """Sounds of 20 frames, and one of 30, that rise by 1 from frame to frame in four features."""
    items = [np.arange(n, dtype=np.float32)[:, None] + np.zeros((1, 4), np.float32) for n in [20] * 39 + [30]]
    examples = Examples({"audio": items})
    return AudioEncoder.fit(AudioInput(**settings), examples), examples


def heard(train: bool = True, **settings) -> list[np.ndarray]:
    encoder, examples = sounds(**settings)
    batch = encoder.encode(examples).batch(ROWS, rng() if train else None)
    return [
        frames[:length].numpy() * encoder.deviation + encoder.mean
        for frames, length in zip(batch["frames"], batch["lengths"].tolist(), strict=True)
    ]


def test_sounds_are_altered_in_training_alone():
    given = sounds()[1]["audio"]
    altered = {"stretch": 0.3, "jitter": 0.5, "mask_frames": 5, "mask_features": 2}
    for settings, train in (({}, True), (altered, False)):
        for found, item in zip(heard(train, **settings), given, strict=True):
            np.testing.assert_allclose(found, item, atol=1e-5)


def test_a_stretched_sound_says_the_same_in_another_time():
    found = heard(stretch=0.25)
    lengths = [len(item) for item in found]
    assert (min(lengths[:-1]), max(lengths[:-1])) == (16, 25)
    assert lengths[-1] <= 30, "no sound becomes longer than the longest: places are made for that many"
    for item in found:
        ends = item[[0, -1], 0]
        np.testing.assert_allclose(ends, [0, 19 if len(item) <= 25 and ends[1] < 25 else 29], atol=1e-4)
        np.testing.assert_allclose(np.diff(item[:, 0]), ends[1] / (len(item) - 1), rtol=1e-3)


def test_frames_and_features_are_blanked():
    encoder, examples = sounds()
    mean = encoder.mean[0]
    frames_blanked, features_blanked = set(), set()
    for found, item in zip(heard(mask_frames=5, mask_features=2), examples["audio"], strict=True):
        changed = np.abs(found - item) > 1e-3
        np.testing.assert_allclose(found[changed], mean, rtol=1e-5)
        features = [place for place in range(4) if changed[:, place].sum() > 5]
        features_blanked.add(len(features))
        rest = [place for place in range(4) if place not in features]
        rows = np.flatnonzero(changed[:, rest].any(1))
        assert len(rows) == 0 or rows[-1] - rows[0] < 5
        frames_blanked.add(len(rows))
    assert features_blanked == {0, 1, 2}
    assert frames_blanked == {0, 1, 2, 3, 4, 5}


def test_noise_has_the_deviation_that_was_asked_for():
    encoder, examples = sounds()
    given = [(item - encoder.mean) / encoder.deviation for item in examples["audio"]]
    found = [(item - encoder.mean) / encoder.deviation for item in heard(jitter=0.2)]
    noise = np.concatenate([a - b for a, b in zip(found, given, strict=True)])
    assert noise.std() == pytest.approx(0.2, rel=0.05)


def test_convolutions_halve_the_picture_before_it_is_cut():
    config = PatchStemConfig(height=8, width=12, patch=4, convolutions=(6, 10), pools=(1,))
    stem = build_stem(config, 5)
    assert stem(torch.randn(3, 1, 8, 12)).x.shape == (3, 6, 5)
    assert [
        tuple(layer.weight.shape) for layer in stem.convolutions if isinstance(layer, torch.nn.Conv2d)
    ] == [
        (6, 1, 3, 3),
        (10, 6, 3, 3),
    ]
    assert tuple(stem.cut.weight.shape) == (5, 10, 2, 2)
    # a patch's vector says something of its neighbours too, and nothing of what lies far away
    near, far = torch.zeros(1, 1, 8, 12), torch.zeros(1, 1, 8, 12)
    near[..., 0, 5], far[..., 7, 11] = 1.0, 1.0
    stem.eval()
    with torch.no_grad():
        nothing, one, other = (stem(image).x[0, 0] for image in (torch.zeros(1, 1, 8, 12), near, far))
    assert not torch.equal(nothing, one)
    assert torch.equal(nothing, other)


def test_what_convolutions_and_pools_may_be():
    assert PatchStemConfig(convolutions=2).convolutions == (32, 32)
    assert ImageInput.from_dict({"convolutions": [8, 16]}).convolutions == (8, 16)
    with pytest.raises(
        ConfigError, match=r"pools must name layers of convolutions \(1\.\.1\), each once; got \(2,\)"
    ):
        PatchStemConfig.from_dict({"convolutions": [8], "pools": [2]})
    with pytest.raises(ConfigError, match=r"patch must be a multiple of 4, .*; got 6"):
        PatchStemConfig.from_dict({"height": 12, "width": 12, "patch": 6, "convolutions": 2, "pools": [1, 2]})
    with pytest.raises(
        ConfigError, match=r"convolutions\.0: input should be greater than or equal to 1; got 0"
    ):
        PatchStemConfig.from_dict({"convolutions": [0]})
