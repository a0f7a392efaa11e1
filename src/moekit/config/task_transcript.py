"""A list of labels whose places in a sequence nobody knows: what was said, and in which order, not when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from moekit.config.base import StrictConfig
from moekit.config.errors import nearest, require


class TranscriptTarget(StrictConfig):
    """Labels in their order, without their places in time."""

    kind: Literal["transcript"] = Field(default="transcript", description="labels in order, without times")
    column: str = Field(default="labels", description="the column: a list of labels, or a text of words")
    input: str = Field(default="sound", description="the input along which they lie")
    beam: int = Field(
        default=1, ge=1, description="label sequences that are kept while decoding; 1 takes the best path"
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")

    def require_input(self, where: str, inputs: Mapping[str, Any]) -> None:
        """Errors: `ConfigError` unless `input` names one that is a sequence in time."""
        found = inputs.get(self.input)
        require(found is not None and found.kind in ("audio", "text", "video"), where, self.input,
                "must be an input of kind audio, text or video", nearest(self.input, list(inputs)))  # fmt: skip


class CtcHeadConfig(StrictConfig):
    """A label or a blank for each token of one stem."""

    kind: Literal["ctc"] = Field(
        default="ctc", description="labels in order, by connectionist classification"
    )
    labels: tuple[str, ...] = Field(
        default=("0",), min_length=1, description="names of the labels, without the blank"
    )
    stem: str = Field(default="sound", description="the stem whose tokens are read")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")
