"""Examples that are made of others: histories of single events, and both directions of a relation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import require


class HistoriesReshape(StrictConfig):
    """Events (user, item, time) become histories: the items so far, and the next one.

    The last event of each user is tested on and the one before it validates, unless the source says otherwise.
    """

    kind: Literal["histories"] = Field(default="histories", description="events become histories")
    by: str = Field(default="user", description="column of whose history it is")
    item: str = Field(default="item", description="column of the items")
    time: str = Field(default="time", description="column of numbers that order the events")
    history: str = Field(default="history", description="name of the new column: the items so far, a list")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.by, self.item, self.time

    @property
    def makes(self) -> tuple[str, ...]:
        return (self.history,)


class ReciprocalReshape(StrictConfig):
    """Each triple is followed by its inverse, so that tails and heads are asked for alike (Lacroix et al. 2018)."""

    kind: Literal["reciprocal"] = Field(default="reciprocal", description="both directions of each triple")
    swap: tuple[str, str] = Field(default=("head", "tail"), description="columns that change places")
    relation: str = Field(default="relation", description="column that is marked in the inverse")
    mark: str = Field(default="inverse ", min_length=1, description="stands before the relation there")

    @model_validator(mode="after")
    def _rules(self) -> ReciprocalReshape:
        require(len({*self.swap, self.relation}) == 3, "swap", self.swap,
                f"must be two different columns, and not relation ({self.relation})")  # fmt: skip
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return *self.swap, self.relation

    @property
    def makes(self) -> tuple[str, ...]:
        return ()


AnyReshape = Annotated[HistoriesReshape | ReciprocalReshape, Field(discriminator="kind")]
