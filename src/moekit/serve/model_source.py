"""A decoder on disk whose weights can be had piece by piece: what it is, and where each expert lies.

run, folder of moekit, Hugging Face folder ─► configuration, files, dense tensors, parts of each expert
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moekit.config.data import DataConfig
from moekit.config.errors import CheckpointError, ConfigError, DataError
from moekit.config.loading import load_run_config
from moekit.config.model import AnyConfig, ModelConfig
from moekit.convert.formats.folder import TENSORS as FOLDER_TENSORS
from moekit.convert.formats.folder import read_description
from moekit.convert.formats.hf_files import TOKENIZER_FILES, TensorFiles
from moekit.convert.formats.hf_folder import names_in, read_hf_config
from moekit.convert.formats.layout import layout
from moekit.convert.formats.opening import kind_of, locate
from moekit.convert.formats.pieces import Piece
from moekit.layers.experts import StackedMLP
from moekit.layers.moe import MoE
from moekit.models.build import build_model
from moekit.models.language_model import LanguageModel
from moekit.models.reshape_experts import shaped_like
from moekit.serve.weight_files import Place, WeightFiles
from moekit.train.checkpoints import STATE, latest_checkpoint
from moekit.train.checkpoints import TENSORS as RUN_TENSORS
from moekit.train.experts import experts_of
from moekit.train.run import with_own_tokenizer


@dataclass
class ModelSource:
    """A decoder's files, opened for reading in pieces.

    Attributes:
        path: of the model.
        kind: "run", "moekit" or "huggingface".
        config: of the model as it is stored.
        files: the weights.
        pieces: how moekit's tensors are made of those of the files; None where they have the same names.
        tokenizer_files, history, data: as `OpenedModel` has them.
    """

    path: Path
    kind: str
    config: ModelConfig
    files: WeightFiles
    pieces: Mapping[str, Piece] | None = None
    tokenizer_files: Mapping[str, Path] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    data: DataConfig | None = None

    def skeleton(self) -> LanguageModel:
        """The model without values, on the meta device."""
        return _without_values(self.config).eval()

    def has(self, name: str) -> bool:
        """Whether the files hold a tensor of moekit's, by itself or in parts."""
        return name in (self.files if self.pieces is None else self.pieces)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor under moekit's name."""
        if self.pieces is None:
            return self.files[name]
        piece = self.pieces[name]
        return piece.join([self.files[part] for part in piece.theirs])

    def expert_parts(self, name: str, expert: int, n_experts: int) -> list[Place]:
        """The places of one expert's part of a stacked tensor, below each other.

        Errors: `ConfigError` where the format stores experts in another order than moekit computes with.
        """
        if self.pieces is None:
            return [self.files.places[name].part(expert)]
        piece = self.pieces[name]
        if len(piece.theirs) == 1:
            return [self.files.places[piece.theirs[0]].part(expert)]
        per = len(piece.theirs) // n_experts
        return [self.files.places[part] for part in piece.theirs[expert * per : (expert + 1) * per]]

    def stored_type(self) -> torch.dtype:
        """The type of the embeddings: that of a model opened as it is stored."""
        name = "stem.weight" if self.pieces is None else self.pieces["stem.weight"].theirs[0]
        return self.files.places[name].dtype

    def close(self) -> None:
        self.files.close()


class _NoFilling(TorchFunctionMode):
    """Initial values of tensors that have none are not drawn: PyTorch would load its compiler for it, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else (kwargs or {}).get("tensor")
        fills = getattr(func, "__name__", "").endswith("_") and getattr(func, "__name__", "")[:1] != "_"
        if fills and isinstance(first, Tensor) and first.is_meta and "require" not in func.__name__:
            return first
        return func(*args, **(kwargs or {}))


def _without_values(config: ModelConfig) -> LanguageModel:
    with torch.device("meta"), _NoFilling():
        model = build_model(config)
    assert isinstance(model, LanguageModel)
    return model


def stacked_experts(model: nn.Module) -> Iterator[tuple[MoE, str, StackedMLP]]:
    """Sparse layers of a decoder with their experts and those's name, the first one first."""
    for name, module in model.named_modules():
        if not isinstance(module, MoE):
            continue
        for inner, part in module.experts.named_modules(prefix=f"{name}.experts"):
            if isinstance(part, StackedMLP):  # beside null experts it is one of two parts
                yield module, inner, part


def find_source(name: str | Path, keep_pages: bool = True) -> ModelSource:
    """Open a decoder's files.

    Args:
        name: as `open_model` takes it, but for GGUF files.
        keep_pages: see `WeightFiles`.

    Errors: `ConfigError` for a model that cannot be read in pieces, with what to do; `DataError` for damaged files.
    """
    path = locate(name)
    kind = kind_of(path)
    if kind == "gguf":
        raise ConfigError(
            f"memory cannot be limited for a GGUF file, whose experts must be unpacked first; got {path}. "
            f"Make a folder of it once: moekit import {path} FOLDER"
        )
    files = {file: path / file for file in TOKENIZER_FILES if (path / file).is_file()}
    if kind == "run":
        source = _run(path, keep_pages, files)
    elif kind == "moekit":
        described = read_description(path)
        config = _decoder(described.config, path)
        weights = WeightFiles([path / FOLDER_TENSORS], keep_pages=keep_pages)
        source = ModelSource(path, kind, config, weights, None, files, described.history, described.data)
    else:
        source = _hugging_face(path, keep_pages, files)
    try:
        _require_complete(source)
    except BaseException:
        source.close()
        raise
    return source


def _run(path: Path, keep_pages: bool, files: Mapping[str, Path]) -> ModelSource:
    config = with_own_tokenizer(load_run_config(path / "config.yaml", []), path)
    if config.train.lora is not None:
        raise ConfigError(
            f"train.lora must be null for experts on disk, which are stored as two parts then; got {path}. Open it "
            "without a limit of memory"
        )
    checkpoint = latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no complete checkpoint yet. Train it on with: moekit resume {path}"
        )
    state = json.loads((checkpoint / STATE).read_bytes())
    model_config = _decoder(config.model, path)
    if "experts" in state:
        model = _without_values(model_config)
        with torch.device("meta"):
            shaped_like(model, experts_of(state["experts"]))
        model_config = model.config
    weights = WeightFiles([checkpoint / RUN_TENSORS], "model.", keep_pages)
    history = ({"step": "trained", "run": path.name, "steps": int(state["step"])},)
    return ModelSource(path, "run", model_config, weights, None, files, history, config.data)


def _hugging_face(path: Path, keep_pages: bool, files: Mapping[str, Path]) -> ModelSource:
    family, config, _ = read_hf_config(path)
    checked = TensorFiles(path)  # that files, index and names fit together
    names = names_in(family.names, checked)
    paths = checked.files
    checked.close()
    if names.packed or names.mxfp4:
        raise ConfigError(
            f"memory cannot be limited where experts are stored the other way round; got {path}. "
            f"Make a folder of it once: moekit import {path} FOLDER"
        )
    pieces = {piece.ours: piece for piece in layout(config, names)}
    return ModelSource(path, "huggingface", config, WeightFiles(paths, keep_pages=keep_pages), pieces, files)


def _decoder(config: AnyConfig, path: Path) -> ModelConfig:
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"memory can be limited for decoders with experts; {path} is of kind {config.kind}")
    return config


def _require_complete(source: ModelSource) -> None:
    """Raise `DataError` for tensors that are missing or of another shape than the configuration says."""
    if source.config.n_layers > len(source.files):  # before time goes into building them
        raise DataError(
            f"{source.path} describes {source.config.n_layers:,} layers; its files hold {len(source.files):,} tensors"
        )
    model = source.skeleton()
    tied = source.config.tie_embeddings
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and tied:
            continue
        if source.pieces is None:
            found = source.files.places.get(name)
            if found is None or found.shape != tuple(tensor.shape):
                raise DataError(
                    f"{source.path}: tensor {name!r} must have shape {list(tensor.shape)}; got "
                    f"{'none' if found is None else list(found.shape)}"
                )
            continue
        parts = source.pieces[name].split(tensor)
        for theirs, part in zip(source.pieces[name].theirs, parts, strict=True):
            found = source.files.places.get(theirs)
            if found is None or found.shape != tuple(part.shape):
                raise DataError(
                    f"{source.path}: tensor {theirs!r} must have shape {list(part.shape)}; got "
                    f"{'none' if found is None else list(found.shape)}"
                )
