"""What a task reads: columns, by the kind of what they hold."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import nearest, require
from moekit.config.task_stems import Convolutions
from moekit.config.task_vision import VideoInput


class TextInput(StrictConfig):
    """A column of text as a sequence of tokens."""

    kind: Literal["text"] = Field(default="text", description="text as a sequence of tokens")
    column: str = Field(default="text", description="the column")
    tokenizer: Literal["bpe", "words", "characters"] = Field(
        default="bpe", description="byte-level BPE, whole words in lower case, or single characters"
    )
    vocab_size: int = Field(default=8192, ge=260, description="largest number of different tokens")
    max_len: int = Field(default=256, ge=1, description="tokens of a text that are read; the rest is cut off")
    unknown: float = Field(
        default=0.0, ge=0, lt=1, description="share of training tokens that are read as unknown: word dropout"
    )


class WordsInput(StrictConfig):
    """A column of lists of words, a token each: known by itself, and by its parts where it is rare or new."""

    kind: Literal["words"] = Field(
        default="words", description="a token for each word, known by its parts too"
    )
    column: str = Field(default="words", description="the column: lists of words, or texts")
    unit: Literal["words", "characters"] = Field(
        default="words", description="what a text that is no list is cut into: at white space, or everywhere"
    )
    vocab_size: int = Field(default=30_000, ge=1, description="most words with a vector of their own")
    min_count: int = Field(default=2, ge=1, description="a word seen less often in training has none")
    ngrams: tuple[int, int] | None = Field(
        default=(3, 5), description="shortest and longest run of characters inside a word; null for none"
    )
    affixes: int = Field(default=3, ge=0, description="longest beginning and ending that count by themselves")
    shape: bool = Field(default=True, description="the order of capitals, small letters, digits and signs")
    pairs: bool = Field(
        default=False, description="the word before together with it, and it together with the next"
    )
    buckets: int = Field(default=2**15, ge=1, description="vectors that the parts share, by their hash")
    rare_dropout: float = Field(
        default=0.25,
        ge=0,
        description="training hides a word seen n times, not its parts, by this / (this + n)",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the words of which training shows the shape alone"
    )
    mix: int = Field(default=0, ge=0, le=4, description="neighbours on either side that a vector takes in")
    max_len: int = Field(default=256, ge=1, description="words of an example that are read")

    @model_validator(mode="after")
    def _rules(self) -> WordsInput:
        if self.ngrams is not None:
            require(1 <= self.ngrams[0] <= self.ngrams[1], "ngrams", list(self.ngrams),
                    "must be two lengths from 1, the shorter one first")  # fmt: skip
        return self


class BagInput(StrictConfig):
    """A column of text as a weighted set of word pieces: TF-IDF, without order."""

    kind: Literal["bag"] = Field(default="bag", description="text as a weighted set of words (TF-IDF)")
    column: str = Field(default="text", description="the column")
    analyzer: Literal["word", "char_wb"] = Field(
        default="word", description="words, or runs of characters inside words"
    )
    ngrams: tuple[int, int] = Field(default=(1, 2), description="shortest and longest run of them")
    min_count: int = Field(default=2, ge=1, description="a term in fewer training texts is left out")
    max_features: int = Field(default=100_000, ge=10, description="the most frequent ones that are kept")
    max_terms: int = Field(default=512, ge=1, description="terms of a text that count, the heaviest ones")
    token: bool = Field(
        default=True, description="also a token of the backbone; false where targets' wide maps alone read it"
    )


class ImageInput(StrictConfig):
    """A column of images, cut into patches."""

    kind: Literal["image"] = Field(default="image", description="an image as a sequence of patches")
    column: str = Field(default="image", description="the column")
    patch: int = Field(default=4, ge=1, description="height and width of a patch, in pixels")
    convolutions: Convolutions = Field(
        default=(),
        description="channels of the convolution layers before the patches are cut; a number n means n of 32",
    )
    pools: tuple[int, ...] = Field(
        default=(), description="convolution layers, from 1, that halve height and width"
    )
    shift: int = Field(default=0, ge=0, description="training images are moved by up to so many pixels")
    flip: bool = Field(default=False, description="training images are mirrored half of the time")
    erase: int = Field(
        default=0, ge=0, description="side of a square that is blanked in training images, in pixels"
    )


class AudioInput(StrictConfig):
    """A column of frames of features (MFCC, log-mel), or of waveforms that become log-mel frames."""

    kind: Literal["audio"] = Field(default="audio", description="sound as a sequence of frames")
    column: str = Field(default="audio", description="the column")
    stride: int = Field(default=1, ge=1, description="frames that are joined into one token")
    max_len: int = Field(default=512, ge=1, description="frames that are read; the rest is cut off")
    deltas: int = Field(
        default=0,
        ge=0,
        le=2,
        description="1 adds how features change from frame to frame, 2 also how that changes",
    )
    jitter: float = Field(
        default=0.0, ge=0, description="deviation of the noise that is added in training, in deviations"
    )
    stretch: float = Field(
        default=0.0, ge=0, lt=1, description="training sounds are made longer or shorter by up to this share"
    )
    mask_frames: int = Field(
        default=0, ge=0, description="up to so many frames in a row are blanked in training sounds"
    )
    mask_features: int = Field(
        default=0, ge=0, description="up to so many features in a row are blanked in training sounds"
    )


class FieldsInput(StrictConfig):
    """Numeric and categorical columns, a token each."""

    kind: Literal["fields"] = Field(default="fields", description="columns of numbers and categories")
    numbers: tuple[str, ...] = Field(
        default=(), description="numeric columns; standardised, missing ones marked"
    )
    categories: tuple[str, ...] = Field(
        default=(), description="categorical columns; rare and unseen ones are one"
    )
    lists: tuple[str, ...] = Field(
        default=(), description="columns that hold lists of categories; rare and unseen ones are left out"
    )
    min_count: int = Field(default=2, ge=1, description="a category seen less often in training is rare")
    bins: int = Field(
        default=0,
        ge=0,
        le=256,
        description="ranges of each number that have a vector of their own; 0 for none",
    )

    @model_validator(mode="after")
    def _rules(self) -> FieldsInput:
        require(self.numbers or self.categories or self.lists, "numbers", self.numbers,
                "must name at least one column", "Or name some in categories or lists")  # fmt: skip
        return self


class IdsInput(StrictConfig):
    """Columns of entities: a table of vectors for each, a token for each column."""

    kind: Literal["ids"] = Field(default="ids", description="columns of entities, such as users and items")
    columns: tuple[str, ...] = Field(default=(), min_length=1, description="the columns")
    products: tuple[tuple[str, str], ...] = Field(
        default=(), description="pairs of columns whose vectors are multiplied, one more token for each pair"
    )
    complex: bool = Field(
        default=False,
        description="multiply as complex numbers (ComplEx): the halves of a vector are the parts",
    )

    @model_validator(mode="after")
    def _rules(self) -> IdsInput:
        for pair in self.products:
            for column in pair:
                require(column in self.columns, "products", column, "must be one of columns",
                        nearest(column, self.columns))  # fmt: skip
        return self


class SequenceInput(StrictConfig):
    """A column of lists of entities in order, such as what a user has seen."""

    kind: Literal["sequence"] = Field(default="sequence", description="a list of entities, in order")
    column: str = Field(default="history", description="the column: lists, or texts of names between spaces")
    max_len: int = Field(default=100, ge=1, description="entities that are read, the last ones")


class ProfileInput(StrictConfig):
    """What else stands in training beside the same entity, with its values: the other films that a user rated.

    An example's own entry is left out, so that its answer is not given away.
    """

    kind: Literal["profile"] = Field(
        default="profile", description="the other entries of the same entity in the training examples"
    )
    by: str = Field(default="user", description="column of the entity whose entries are read")
    of: str = Field(default="item", description="column of the entities in its entries")
    value: str | None = Field(
        default=None, description="column of numbers that weigh the entries, such as ratings"
    )
    max_len: int = Field(default=256, ge=1, description="entries that are read")
    keep: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="share of them that is read in training, others each time: where all were read, what is missing "
        "would give the example's own value away",
    )
    shrink: float = Field(
        default=5.0, ge=0, description="means are taken as if so many entries had the mean of all"
    )

    @model_validator(mode="after")
    def _rules(self) -> ProfileInput:
        require(self.by != self.of, "of", self.of, "must be another column than by")
        return self


AnyInput = Annotated[
    Union[  # noqa: UP007  one a line
        TextInput,
        WordsInput,
        BagInput,
        ImageInput,
        AudioInput,
        FieldsInput,
        IdsInput,
        SequenceInput,
        ProfileInput,
        VideoInput,
    ],
    Field(discriminator="kind"),
]
