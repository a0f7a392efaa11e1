"""Sound as frames: the logarithm of the energy in bands that are about as wide as the ear's."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from moekit.config.errors import DataError, MissingExtraError, require

# samples a second that sounds of all origins are brought to, so that their bands are the same
RATE = 8_000
# below this energy a band is as good as silent; the quantisation of 16 bits lies at about -18 too
_FLOOR = 1e-8


def mel_filters(n_mels: int, n_bins: int, rate: int) -> np.ndarray:
    """Triangles `[n_mels, n_bins]` that overlap by half, evenly spaced in mel from 0 to rate/2.

    Mel is 2595 · log10(1 + Hz/700), the form of the Hidden Markov Model Toolkit. A triangle rises from 0 at
    the middle of the one before it to 1 at its own middle. The bins are those of a spectrum, evenly spaced from 0 to
    rate/2.

    Errors: `ConfigError` where a triangle would hold no bin, because there are too many of them.
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, n_mels + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, n_bins)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    require(
        (filters.sum(1) > 0).all(),
        "n_mels",
        n_mels,
        f"must leave a bin to each band; there are {n_bins} bins",
    )
    return filters


def log_mel(
    samples: np.ndarray, rate: int, n_mels: int = 40, window: float = 0.025, hop: float = 0.010
) -> np.ndarray:
    """Frames `[T, n_mels]` float32 of a sound: log of the energy in each band, natural logarithm.

    Each frame is a stretch of `window` seconds under a Hann window, filled up with zeros to a power of two; its power
    spectrum is summed under the triangles of `mel_filters`. T is 1 + (n - window) // hop; a sound shorter than a
    window is filled up to one.

    Args:
        samples: `[n]`, integers of 16 bits or floats from -1 to 1.
        rate: samples in a second.
        n_mels: number of bands.
        window, hop: seconds that a frame covers, and from one frame to the next.

    >>> log_mel(np.zeros(8000, dtype=np.int16), 8000).shape
    (98, 40)
    """
    size, step = round(window * rate), round(hop * rate)
    sound = samples.astype(np.float64) / (32768 if samples.dtype == np.int16 else 1)
    if len(sound) < size:
        sound = np.pad(sound, (0, size - len(sound)))
    frames = np.lib.stride_tricks.sliding_window_view(sound, size)[::step]
    # the periodic form of the window: 1 in the middle, 0 at the first sample
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    n_fft = 1 << (size - 1).bit_length()
    power = np.abs(np.fft.rfft(frames * hann, n_fft)) ** 2
    energy = power @ mel_filters(n_mels, power.shape[1], rate).T
    return np.log(np.maximum(energy, _FLOOR)).astype(np.float32)


def wave_frames(path: Path, rate: int = RATE) -> np.ndarray:
    """Log-mel frames `[T, 40]` of a WAV file of 8, 16 or 32 bits: channels averaged, `rate` samples a second.

    Errors: `DataError` for what is no such file; `MissingExtraError` where another rate needs SciPy and it is missing.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(f"{path} is no WAV file with plain samples (PCM): {error}") from None
    kinds = {1: (np.uint8, 128.0, 128.0), 2: (np.int16, 0.0, 2.0**15), 4: (np.int32, 0.0, 2.0**31)}
    if width not in kinds:
        raise DataError(f"{path} has samples of {8 * width} bits; they must have 8, 16 or 32")
    kind, middle, scale = kinds[width]
    whole = len(data) // (width * channels) * width * channels
    samples = (
        ((np.frombuffer(data[:whole], kind).astype(np.float32) - middle) / scale)
        .reshape(-1, channels)
        .mean(1)
    )
    if len(samples) < rate // 40:
        raise DataError(f"{path} holds {len(samples)} samples, less than a frame of 25 ms")
    if own != rate:
        try:
            from scipy.signal import resample_poly
        except ImportError:
            raise MissingExtraError(
                f"{path} has {own} samples a second; SciPy brings them to {rate}: pip install 'moekit[tasks]'"
            ) from None
        shared = np.gcd(own, rate)
        samples = resample_poly(samples, rate // shared, own // shared).astype(np.float32)
    return log_mel(samples, rate)
