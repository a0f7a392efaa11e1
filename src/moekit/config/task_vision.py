"""Pictures and clips: what is read and answered beyond a class, and the stem and heads for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import nearest, require

# ------------------------------------------------------------------------------------------------------------ inputs


class VideoInput(StrictConfig):
    """A column of clips, cut into blocks of a patch and some frames."""

    kind: Literal["video"] = Field(
        default="video", description="a clip as a sequence of blocks in space and time"
    )
    column: str = Field(default="clip", description="the column")
    patch: int = Field(default=8, ge=1, description="height and width of a block, in pixels")
    frames: int = Field(default=2, ge=1, description="frames of a block")


class TubeletStemConfig(StrictConfig):
    """A clip to a vector for each block of a patch and some frames."""

    kind: Literal["tubelets"] = Field(
        default="tubelets", description="a clip, cut into blocks in space and time"
    )
    channels: int = Field(default=1, ge=1, description="channels of a frame")
    length: int = Field(default=8, ge=1, description="frames of a clip")
    height: int = Field(default=32, ge=1, description="in pixels")
    width: int = Field(default=32, ge=1, description="in pixels")
    patch: int = Field(default=8, ge=1, description="height and width of a block, in pixels")
    frames: int = Field(default=2, ge=1, description="frames of a block")

    @model_validator(mode="after")
    def _rules(self) -> TubeletStemConfig:
        for side in ("height", "width"):
            require(getattr(self, side) % self.patch == 0, side, getattr(self, side),
                    f"must be a multiple of patch ({self.patch})")  # fmt: skip
        require(self.length % self.frames == 0, "length", self.length,
                f"must be a multiple of frames ({self.frames})")  # fmt: skip
        return self

    @property
    def n_patches(self) -> int:
        return (self.length // self.frames) * (self.height // self.patch) * (self.width // self.patch)


# ----------------------------------------------------------------------------------------------------------- targets


class _InPicture(StrictConfig):
    """Of what lies in the pixels of an input."""

    def require_input(self, where: str, inputs: Mapping[str, Any]) -> None:
        """Errors: `ConfigError` unless `input` names an image that is neither moved nor mirrored in training."""
        name = self.input  # type: ignore[attr-defined]
        image = inputs.get(name)
        require(image is not None and image.kind == "image", where, name, "must be an input of kind image",
                nearest(name, list(inputs)))  # fmt: skip
        still = image is not None and image.shift == 0 and not image.flip
        require(
            still,
            f"inputs.{name}",
            "shift or flip",
            "cannot be set: the answers would not move with the pixels",
        )


class BoxesTarget(_InPicture):
    """Things in a picture: their boxes and their classes."""

    kind: Literal["boxes"] = Field(default="boxes", description="boxes around things, and their classes")
    column: str = Field(default="boxes", description="the column: a list of [y, x, height, width], in pixels")
    label_column: str = Field(default="labels", description="the column of their classes, in the same order")
    input: str = Field(default="image", description="the input of kind image in which the things are")
    threshold: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="an answer names boxes of at least this score; a metric sees them all",
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")


class MaskTarget(_InPicture):
    """A class for each pixel of a picture."""

    kind: Literal["mask"] = Field(default="mask", description="a class for each pixel")
    column: str = Field(default="mask", description="the column: [height, width] of whole numbers from 0 on")
    input: str = Field(default="image", description="the input of kind image whose pixels they are")
    refine: int = Field(
        default=0, ge=0,
        description="features of a pixel that a convolution joins with the picture itself; 0 for no convolution",
    )  # fmt: skip
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")


class CodesTarget(StrictConfig):
    """A picture that is generated, patch by patch, from a codebook of patches."""

    kind: Literal["codes"] = Field(
        default="codes", description="a picture to be generated, as codes of its patches"
    )
    column: str = Field(default="image", description="the column of pictures; not read in prediction")
    patch: int = Field(default=4, ge=1, description="height and width of a patch, in pixels")
    codes: int = Field(default=256, ge=2, description="patches in the codebook, the centres of k-means")
    temperature: float = Field(
        default=1.0, gt=0, description="of the draws; below 1 the likely codes come more often"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="draw among the likeliest codes that hold this share together"
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")


# ------------------------------------------------------------------------------------------------------------- heads


class _OnPatches(StrictConfig):
    """Of a head that reads the patches of one image stem."""

    stem: str = Field(default="image", description="the stem of kind patches whose patches are read")
    height: int = Field(default=28, ge=1, description="of the image, in pixels")
    width: int = Field(default=28, ge=1, description="of the image, in pixels")
    patch: int = Field(default=4, ge=1, description="height and width of a patch, in pixels")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom, and from left to right."""
        return self.height // self.patch, self.width // self.patch


class DetectHeadConfig(_OnPatches):
    """A box, whether there is one, and its class, from each patch."""

    kind: Literal["detect"] = Field(default="detect", description="boxes and their classes")
    labels: tuple[str, ...] = Field(default=("thing",), min_length=1, description="names of the classes")
    typical: tuple[float, float] = Field(
        default=(16.0, 16.0), description="height and width of a box in the middle, in pixels"
    )

    @model_validator(mode="after")
    def _rules(self) -> DetectHeadConfig:
        require(min(self.typical) > 0, "typical", self.typical, "must be above 0")
        return self


class SegmentHeadConfig(_OnPatches):
    """A class for each pixel."""

    kind: Literal["segment"] = Field(default="segment", description="a class for each pixel")
    classes: int = Field(default=2, ge=2, description="number of classes")
    channels: int = Field(default=1, ge=1, description="channels of the image")
    refine: int = Field(
        default=0, ge=0,
        description="features of a pixel that a convolution joins with the picture itself; 0 for no convolution",
    )  # fmt: skip


class CodesHeadConfig(StrictConfig):
    """The codes of a picture's patches, one after the other."""

    kind: Literal["codes"] = Field(default="codes", description="codes of patches, one after the other")
    codes: int = Field(default=256, ge=2, description="size of the codebook")
    length: int = Field(default=49, ge=1, description="patches of a picture")
    temperature: float = Field(default=1.0, gt=0, description="of the draws")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="draw among the likeliest codes that hold this share together"
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")
