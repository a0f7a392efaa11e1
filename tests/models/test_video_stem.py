"""Clips in blocks: each token is a linear map of its own block, in order of time, row and column."""

from __future__ import annotations

import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.task_vision import TubeletStemConfig
from moekit.models.video_stem import TubeletStem


def test_a_token_is_its_block_and_its_place():
    torch.manual_seed(0)
    stem = TubeletStem(TubeletStemConfig(channels=2, length=4, height=4, width=6, patch=2, frames=2), 5)
    clips = torch.randn(3, 4, 2, 4, 6)
    x = stem(clips).x
    assert x.shape == (3, 12, 5)
    for token, (time, row, column) in enumerate(torch.cartesian_prod(*map(torch.arange, (2, 2, 3))).tolist()):
        block = clips[:, time * 2 : time * 2 + 2, :, row * 2 : row * 2 + 2, column * 2 : column * 2 + 2]
        expected = stem.map(block.flatten(1)) + stem.moments[time, 0] + stem.places[row * 3 + column]
        torch.testing.assert_close(x[:, token], expected)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"height must be a multiple of patch \(8\); got 30"):
        TubeletStemConfig.from_dict({"height": 30})
    with pytest.raises(ConfigError, match=r"length must be a multiple of frames \(2\); got 7"):
        TubeletStemConfig.from_dict({"length": 7})
