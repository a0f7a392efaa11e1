"""Words of a text as the classical methods take them; a Chinese or Japanese character is a word by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from moekit.config.errors import ConfigError, require
from moekit.config.task import TextInput, WordsInput
from moekit.evaluate.baselines.base import Problem

# writing without spaces: kana, Chinese characters with their extensions, and the compatibility block
_UNSPACED = "぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff"
WORD_PATTERN = rf"(?u)[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+"
_WORD = re.compile(WORD_PATTERN)


def split_words(text: str) -> list[str]:
    """Words in lower case without punctuation.

    >>> split_words("It's 中文 text_2")
    ['it', 's', '中', '文', 'text_2']
    """
    return _WORD.findall(text.lower())


def tagged_words(problem: Problem) -> tuple[str, str]:
    """The column whose words a target of tags is about, and how its texts are cut, for `words_of`.

    Errors: `ConfigError` where the target names no input of kind text or words.
    """
    read = problem.inputs.get(problem.target.input)
    require(isinstance(read, TextInput | WordsInput), f"targets.{problem.name}.input", problem.target.input,
            "must be an input of kind text or words")  # fmt: skip
    assert isinstance(read, TextInput | WordsInput)
    return read.column, read.unit if isinstance(read, WordsInput) else read.tokenizer


def words_of(text: Any, unit: str) -> Sequence[str]:
    """The words that tags stand for: a list as it is, a string by spaces or, for the unit characters, by characters.

    >>> words_of("a bc", "words"), words_of("你好", "characters"), words_of(["x y", "z"], "words")
    (['a', 'bc'], ['你', '好'], ['x y', 'z'])
    """
    if isinstance(text, str):
        return list(text) if unit == "characters" else text.split()
    if not isinstance(text, list | tuple):
        raise ConfigError(f"a tagged text must be a string or a list of words; got {type(text).__name__}")
    return list(text)
