"""Answers to one input or to a file of them: prediction, probability, and the experts that decided."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError, require
from moekit.config.task import PatchStemConfig, WordsInput
from moekit.data.examples import Examples
from moekit.data.tables import SIGNALS, TABLES, read_examples, read_signal
from moekit.data.task_data import columns_of_inputs
from moekit.evaluate.drawing import answer_picture, save_png
from moekit.evaluate.task import layers_of, predict, top_experts
from moekit.observe.recorder import Recorder
from moekit.observe.recorder import layers_of as sparse_layers
from moekit.train.run import LoadedTask, load_task_run

# of red, green and blue in what looks equally bright (ITU-R BT.601)
LUMINANCE = (0.299, 0.587, 0.114)
# abbreviations with their points, words with what stands inside them, signs
_WORD = re.compile(r"(?:[^\W\d_]\.){2,}|\w+(?:[-'’.,/&]\w+)*|[^\w\s]")


def answers_to(
    run: Path | str, given: str, columns: Mapping[str, str] | None = None, *, n_experts: int = 2,
    draw: Path | None = None, record: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What a trained task says of a text, or of each example of a file.

    Args:
        run: folder of the run.
        given: a text, the path of a file of examples, or of one picture, sound or array.
        columns: the task's name of a column to the file's.
        n_experts: experts named in each layer.
        draw: a folder for a PNG of each answer that is a picture; the answer names its file as `drawn`.
        record: a folder for the routing record of every token.

    Each answer has the number of its example, `answers` by target and `experts`; and `words` where a text was cut into
    words that have a tag each.

    Errors: `ConfigError` where a text is given to a task that reads something else, a column is missing, or the routing
    of a model without experts is to be recorded.
    """
    loaded = load_task_run(run)
    examples = examples_given(loaded, given, columns or {})
    recorder = None
    if record is not None:
        require(
            loaded.model.moe_layers, "record", str(record), "needs a model with experts; this one is dense"
        )
        recorder = Recorder(sparse_layers(loaded.model), tokens=1.0, source="prediction")
    found = predict(loaded.model, loaded.encoding, examples, with_experts=n_experts > 0, recorder=recorder)
    if recorder is not None and record is not None:
        recorder.record(run=loaded.folder.name, step=loaded.step, given=given).save(record)
    layers = layers_of(loaded.model)
    cut = _is_tagger(loaded) and not _is_file(given)
    if draw is not None:
        _draw(loaded, examples, found.answers, draw)
    return [
        {
            "example": number + 1,
            **({"words": next(iter(examples.columns.values()))[number]} if cut else {}),
            "answers": {name: said[number] for name, said in found.answers.items()},
            "experts": top_experts(found.experts[number], n_experts, layers) if n_experts > 0 else [],
        }
        for number in range(len(examples))
    ]


def _draw(
    loaded: LoadedTask, examples: Examples, answers: Mapping[str, list[dict[str, Any]]], folder: Path
) -> None:
    for name, encoder in loaded.encoding.targets.items():
        read: Any = loaded.encoding.inputs.get(getattr(encoder.config, "input", ""))  # type: ignore[attr-defined]
        column = None if read is None or read.kind != "image" else read.config.column
        for row, answer in enumerate(answers[name]):
            image = None if column is None else np.asarray(examples[column][row])
            picture = answer_picture(encoder, answer, image)
            if picture is not None:
                answer["drawn"] = str(save_png(folder / f"{name}-{row + 1}.png", picture))


def examples_given(loaded: LoadedTask, given: str, columns: Mapping[str, str]) -> Examples:
    """A text, or the examples of a file, as the task reads them; arguments and errors as of `answers_to`."""
    wanted = columns_of_inputs(loaded.config)
    if _is_file(given):
        path = Path(given)
        if path.suffix.lower() in SIGNALS and len(wanted) == 1:
            return Examples({wanted[0]: [_fitting(loaded, read_signal(path))]}, [str(path)])
        return read_examples(path, columns, wanted)
    inputs = loaded.config.inputs.values()
    texts = [part.column for part in inputs if part.kind in ("text", "words", "bag")]
    if len(set(texts)) != 1 or set(wanted) != set(texts):
        raise ConfigError(
            f"INPUT must be a file ending in {', '.join((*TABLES, *SIGNALS))}: this task reads "
            f"{', '.join(wanted)}"
        )
    units = [part.unit for part in inputs if isinstance(part, WordsInput)]
    # a task that tags words has been given lists of them
    if units or _is_tagger(loaded):
        return Examples({texts[0]: [words_of(given, units[0] if units else None)]})
    return Examples({texts[0]: [given]})


def _fitting(loaded: LoadedTask, signal: Any) -> Any:
    """An image with the channels that the model was trained on: grey levels of colours, or three times the grey."""
    for stem in loaded.config.model.stems.values():
        if isinstance(stem, PatchStemConfig) and signal.ndim == 3 and signal.shape[-1] != stem.channels:
            if stem.channels == 1:
                return (signal @ LUMINANCE).round().astype(signal.dtype)[..., None]
            if signal.shape[-1] == 1:
                return signal.repeat(stem.channels, axis=-1)
    return signal


def _is_file(given: str) -> bool:
    path = Path(given)
    return path.suffix.lower() in TABLES or (len(given) < 256 and path.exists())


def _is_tagger(loaded: LoadedTask) -> bool:
    return any(target.kind == "tags" for target in loaded.config.targets.values())


def words_of(text: str, unit: str | None = None) -> list[str]:
    """Words of a text as corpora have them, signs by themselves.

    Args:
        text: to be cut.
        unit: "words" or "characters"; None takes single characters where the text is written without spaces (Chinese).

    >>> words_of("We're in the U.S., he said.")
    ["We're", 'in', 'the', 'U.S.', ',', 'he', 'said', '.']
    >>> words_of("江泽民在 北京。")
    ['江', '泽', '民', '在', '北', '京', '。']
    """
    if unit is None:
        cjk = sum("\u3000" <= character <= "\u9fff" for character in text)
        unit = "characters" if cjk * 2 > len(text) else "words"
    return [c for c in text if not c.isspace()] if unit == "characters" else _WORD.findall(text)
