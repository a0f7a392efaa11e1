"""Log-mel frames: bands and energies worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moekit.config.errors import ConfigError
from moekit.data.log_mel import log_mel, mel_filters


def test_two_bands_worked_out_by_hand() -> None:
    # 4000 Hz are 2595·log10(1 + 4000/700) = 2146.06 mel; a third is 715.35 mel = 700·(10^(715.35/2595) - 1) = 620.6 Hz,
    # two thirds 1791.5 Hz. Of the bins at 0, 1000, 2000, 3000, 4000 Hz, the first triangle (0 - 620.6 - 1791.5) holds
    # 1000 Hz at (1791.5 - 1000) / 1170.9; the second (620.6 - 1791.5 - 4000) three, falling by 2208.5 Hz.
    filters = mel_filters(2, 5, 8000)
    expected = [
        [0, 791.5 / 1170.9, 0, 0, 0],
        [0, (1000 - 620.6) / 1170.9, 2000 / 2208.5, 1000 / 2208.5, 0],
    ]
    np.testing.assert_allclose(filters, expected, atol=2e-4)


def test_an_impulse_has_the_same_power_everywhere() -> None:
    # the window is 1 in its middle (sample 100 of 200), so an impulse there has power 1 in every bin
    sound = np.zeros(360)
    sound[100] = 1.0
    frames = log_mel(sound, 8000)
    assert frames.shape == (3, 40)
    assert frames.dtype == np.float32
    np.testing.assert_allclose(frames[0], np.log(mel_filters(40, 129, 8000).sum(1)), rtol=1e-5)
    # one hop of 80 samples later it stands at sample 20: the window is 0.5 - 0.5·cos(36°) = 0.0955 there
    np.testing.assert_allclose(frames[1], frames[0] + 2 * np.log(0.0954915), rtol=1e-4)
    # and before the third frame begins: silence, at the floor
    np.testing.assert_allclose(frames[2], np.log(1e-8), rtol=1e-5)


def test_a_tone_is_loudest_in_its_band() -> None:
    time = np.arange(8000) / 8000
    corners = 700 * (10 ** (np.linspace(0, 2146.06, 42) / 2595) - 1)
    for band in (5, 20, 35):
        frames = log_mel(np.sin(2 * np.pi * corners[band + 1] * time), 8000)
        assert (frames.argmax(1) == band).all()


def test_sixteen_bits_and_floats_agree_and_short_sounds_are_one_frame() -> None:
    whole = np.array([0, 8192, -16384, 32767] * 100, dtype=np.int16)
    np.testing.assert_array_equal(log_mel(whole, 8000), log_mel(whole / 32768, 8000))
    assert log_mel(whole[:3], 8000).shape == (1, 40)
    assert log_mel(whole[:0], 8000).shape == (1, 40)
    assert log_mel(whole[:279], 8000).shape == (1, 40)
    assert log_mel(whole[:280], 8000).shape == (2, 40)


def test_more_bands_than_bins_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="n_mels must leave a bin to each band; there are 129 bins; got 120"
    ):
        log_mel(np.zeros(400), 8000, n_mels=120)
