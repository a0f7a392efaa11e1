"""Stems of a task, which turn inputs into vectors; sizes are filled in from the data."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.task_vision import TubeletStemConfig


def _channels(value: Any) -> Any:
    """A number of layers stands for so many of 32 channels."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return (32,) * value if whole else value


Convolutions = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_channels)]


class TokenStemConfig(StrictConfig):
    """Token ids to vectors."""

    kind: Literal["tokens"] = Field(default="tokens", description="token ids")
    vocab_size: int = Field(default=2, ge=2, description="number of token ids; 0 is padding")


class WordStemConfig(StrictConfig):
    """Words to vectors, by themselves and by their parts."""

    kind: Literal["words"] = Field(default="words", description="words and their parts")
    vocab_size: int = Field(default=2, ge=2, description="number of word ids; 0 is padding, 1 other words")
    buckets: int = Field(default=1, ge=1, description="vectors of parts, whose ids begin at 1")
    mix: int = Field(default=0, ge=0, le=4, description="neighbours on either side that a vector takes in")


class BagStemConfig(StrictConfig):
    """A weighted set of ids to one vector."""

    kind: Literal["bag"] = Field(default="bag", description="a weighted set of ids")
    vocab_size: int = Field(default=2, ge=2, description="number of ids; 0 is padding")


class PatchStemConfig(StrictConfig):
    """An image to a vector for each patch."""

    kind: Literal["patches"] = Field(default="patches", description="an image, cut into patches")
    channels: int = Field(default=1, ge=1, description="channels of the image")
    height: int = Field(default=28, ge=1, description="in pixels")
    width: int = Field(default=28, ge=1, description="in pixels")
    patch: int = Field(default=4, ge=1, description="height and width of a patch, in pixels")
    convolutions: Convolutions = Field(
        default=(), description="channels of the convolution layers before that; a number n means n of 32"
    )
    pools: tuple[int, ...] = Field(
        default=(), description="convolution layers, from 1, that halve height and width"
    )

    @model_validator(mode="after")
    def _rules(self) -> PatchStemConfig:
        layers = range(1, len(self.convolutions) + 1)
        require(len(set(self.pools)) == len(self.pools) and all(layer in layers for layer in self.pools), "pools",
                self.pools, f"must name layers of convolutions (1..{len(layers)}), each once")  # fmt: skip
        require(self.patch % 2 ** len(self.pools) == 0, "patch", self.patch,
                f"must be a multiple of {2 ** len(self.pools)}, which pools make one")  # fmt: skip
        for side in ("height", "width"):
            require(getattr(self, side) % self.patch == 0, side, getattr(self, side),
                    f"must be a multiple of patch ({self.patch})")  # fmt: skip
        return self

    @property
    def n_patches(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)


class FrameStemConfig(StrictConfig):
    """Frames of features to a vector for each group of them."""

    kind: Literal["frames"] = Field(default="frames", description="frames of features")
    n_features: int = Field(default=13, ge=1, description="features of a frame")
    stride: int = Field(default=1, ge=1, description="frames joined into one token")


class FieldStemConfig(StrictConfig):
    """Numbers and categories to a vector each."""

    kind: Literal["fields"] = Field(default="fields", description="numbers and categories")
    n_numbers: int = Field(default=0, ge=0, description="numeric columns")
    n_bins: int = Field(
        default=0, ge=0, description="ranges of each numeric column with a vector of their own"
    )
    sizes: tuple[int, ...] = Field(default=(), description="categories of each categorical column")
    list_sizes: tuple[int, ...] = Field(default=(), description="categories of each column of lists")


class IdStemConfig(StrictConfig):
    """Entities to a vector each."""

    kind: Literal["ids"] = Field(default="ids", description="entities")
    sizes: tuple[int, ...] = Field(default=(1,), min_length=1, description="entities of each column")
    products: tuple[tuple[int, int], ...] = Field(
        default=(), description="pairs of columns, by number, whose vectors are multiplied"
    )
    complex: bool = Field(default=False, description="multiply as complex numbers")

    @property
    def n_tokens(self) -> int:
        return len(self.sizes) + len(self.products)


class ProfileStemConfig(StrictConfig):
    """A weighted set of entities, and numbers about it, to two vectors."""

    kind: Literal["profile"] = Field(default="profile", description="a weighted set of entities")
    size: int = Field(default=2, ge=2, description="entities; 0 is padding")


AnyStem = Annotated[
    Union[  # noqa: UP007  one a line
        TokenStemConfig,
        WordStemConfig,
        BagStemConfig,
        PatchStemConfig,
        FrameStemConfig,
        FieldStemConfig,
        IdStemConfig,
        ProfileStemConfig,
        TubeletStemConfig,
    ],
    Field(discriminator="kind"),
]


def n_fixed_tokens(stem: AnyStem) -> int | None:
    """Tokens that a stem gives for every example; None where their number depends on the example."""
    if isinstance(stem, FieldStemConfig):
        return stem.n_numbers + len(stem.sizes) + len(stem.list_sizes)
    if isinstance(stem, IdStemConfig):
        return stem.n_tokens
    if isinstance(stem, ProfileStemConfig):
        return 2
    if isinstance(stem, PatchStemConfig | TubeletStemConfig):
        return stem.n_patches
    return 1 if isinstance(stem, BagStemConfig) else None
