"""Answers made of language: a text that is generated, and a stretch of the text that was read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import require


class SequenceTarget(StrictConfig):
    """A text, generated token by token: a translation, a reply."""

    kind: Literal["sequence"] = Field(default="sequence", description="a text that is generated")
    column: str = Field(default="target", description="the column")
    share: str | None = Field(
        default=None,
        description="an input of kind text whose tokenizer, then trained on both columns, and table it shares",
    )
    tokenizer: Literal["bpe", "words", "characters"] = Field(
        default="bpe", description="its own tokenizer, where it shares none"
    )
    vocab_size: int = Field(default=8192, ge=260, description="of its own tokenizer")
    max_len: int = Field(default=256, ge=1, description="tokens of an answer; the rest is cut off")
    layers: int = Field(default=2, ge=1, description="layers of the decoder")
    tied: bool = Field(default=True, description="one table for tokens read and tokens answered")
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="label smoothing in training")
    beams: int = Field(default=4, ge=1, description="beams of the search; 1 is greedy")
    length_penalty: float = Field(
        default=1.0, ge=0, description="larger prefers longer answers; 0 compares plain probabilities"
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")


class SpanTarget(StrictConfig):
    """A stretch of a text input: the answer to a question, the slot of a request.

    Either the answer itself is given, which is looked for in the text (at `start` where that column is named, else
    where it stands first; empty for no answer), or both ends, in characters. An answer is never less than a token: read
    writing without spaces by characters.
    """

    kind: Literal["span"] = Field(default="span", description="a stretch of a text that was read")
    input: str = Field(default="text", description="the input of kind text that holds it")
    column: str | None = Field(default="answer", description="the column with the answer as text")
    start: str | None = Field(
        default=None, description="a column with the place of its first character, from 0"
    )
    end: str | None = Field(default=None, description="a column with the place behind its last character")
    longest: int = Field(default=30, ge=1, description="tokens of an answer at most")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")

    @model_validator(mode="after")
    def _rules(self) -> SpanTarget:
        if self.column is None:
            require(self.start is not None and self.end is not None, "column", None,
                    "must be given, or both start and end")  # fmt: skip
        else:
            require(self.end is None, "end", self.end, "must be left out where column holds the answer",
                    "Or set column: null")  # fmt: skip
        return self


class SequenceHeadConfig(StrictConfig):
    """A decoder behind the backbone."""

    kind: Literal["sequence"] = Field(default="sequence", description="a decoder that generates")
    vocab_size: int = Field(default=2, ge=2, description="number of token ids; 0 begins and ends an answer")
    layers: int = Field(default=2, ge=1, description="layers of the decoder")
    share: str | None = Field(default=None, description="the stem of kind tokens whose table it shares")
    tied: bool = Field(default=True, description="one table for tokens read and tokens answered")
    never: tuple[int, ...] = Field(default=(), description="token ids that are never generated")
    max_len: int = Field(default=256, ge=1, description="tokens of an answer, its end counted")
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing in training")
    beams: int = Field(default=1, ge=1, description="beams of the search; 1 is greedy")
    length_penalty: float = Field(default=1.0, ge=0, description="exponent of the length, Wu et al. 2016")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")


class SpanHeadConfig(StrictConfig):
    """The first and the last token of an answer among one stem's tokens."""

    kind: Literal["span"] = Field(default="span", description="where an answer starts and ends")
    stem: str = Field(default="text", description="the stem whose tokens hold it")
    may_be_empty: bool = Field(default=False, description="whether there may be no answer")
    longest: int = Field(default=30, ge=1, description="tokens of an answer at most")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")
