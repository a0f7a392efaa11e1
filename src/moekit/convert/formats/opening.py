"""Open a model wherever it lies: a run, a folder of moekit, a Hugging Face folder or name, or a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moekit.config.data import DataConfig
from moekit.config.errors import ConfigError, DataError, MissingExtraError
from moekit.config.model import AnyConfig
from moekit.convert.formats.assembly import Accounting
from moekit.convert.formats.encoder_folder import (
    MODULES,
    is_encoder_folder,
    longest_text,
    read_encoder_folder,
)
from moekit.convert.formats.folder import is_model_folder, read_description, read_model_folder
from moekit.convert.formats.hf_files import CONFIG, TOKENIZER_FILES, read_json
from moekit.convert.formats.hf_folder import read_hf_folder
from moekit.data.text_batches import TextBatches
from moekit.data.tokenizer import Tokenizer, load_tokenizer
from moekit.models.encoder import Encoder
from moekit.models.language_model import LanguageModel

_KIND_OF_MODEL = {"decoder": "a decoder", "transformer_xl": "a Transformer-XL", "encoder": "an encoder"}
KINDS = {
    "run": "run of moekit",
    "moekit": "model folder of moekit",
    "huggingface": "Hugging Face folder",
    "gguf": "GGUF file",
}


@dataclass(frozen=True)
class OpenedModel:
    """A model with what belongs to it.

    Attributes:
        model: of moekit, in evaluation mode.
        path: where it lies.
        kind: "run", "moekit", "huggingface" or "gguf".
        tokenizer: None where the source has none that moekit reads; an encoder's is in `text_batches`.
        tokenizer_files: the tokenizer's files by name, to be kept with the model.
        history: the steps that made it, oldest first.
        accounting: what became of the tensors of a foreign source.
        architecture: what a GGUF file calls its own; "" for others.
        data: the text it was trained on, where that is known.
    """

    model: nn.Module
    path: Path
    kind: str
    tokenizer: Tokenizer | None
    tokenizer_files: Mapping[str, Path] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    accounting: Accounting | None = None
    architecture: str = ""
    data: DataConfig | None = None

    @property
    def config(self) -> AnyConfig:
        config: AnyConfig = self.model.config  # type: ignore[assignment]
        return config

    @property
    def name(self) -> str:
        """What to call the model: its folder, or its file without the ending."""
        path = Path(os.path.abspath(self.path))  # for "."; links keep their names
        return path.stem if self.kind == "gguf" else path.name  # a folder's Qwen2.5-0.5B has no ending

    def marker_ids(self) -> dict[str, Any]:
        """Ids of the first, last and padding token, where the model's own files say them."""
        path = self.tokenizer_files.get("generation_config.json")
        if path is None and self.kind == "huggingface":
            path = self.path / CONFIG  # where transformers takes them from then
        given = {} if path is None else read_json(path)
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {key: given[key] for key in keys if given.get(key) is not None}

    @property
    def decoder(self) -> LanguageModel:
        """The model, where it is a decoder. Errors: `ConfigError` for another kind."""
        if isinstance(self.model, LanguageModel):
            return self.model
        raise ConfigError(f"{self.path} is {_KIND_OF_MODEL[self.config.kind]}; this works on decoders only")

    @property
    def encoder(self) -> Encoder:
        """The model, where it is an encoder. Errors: `ConfigError` for another kind."""
        if isinstance(self.model, Encoder):
            return self.model
        raise ConfigError(f"{self.path} is {_KIND_OF_MODEL[self.config.kind]}; this works on encoders only")

    def text_batches(self) -> TextBatches | None:
        """Texts as an encoder reads them, cut where its maker cut them; None without a tokenizer."""
        path = self.tokenizer_files.get("tokenizer.json")
        return None if path is None else TextBatches(path, longest_text(self.path, self.encoder.config))


def kind_of(path: Path) -> str:
    """Which of `KINDS` lies at a path.

    Errors: `DataError` where there is none of them.
    """
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if is_model_folder(path):
        return "moekit"
    if (path / "config.yaml").is_file():
        return "run"
    if (path / CONFIG).is_file():
        return "huggingface"
    what = "does not exist"
    if path.exists():
        neither = "has neither moekit.json nor config.yaml nor config.json"
        what = neither if path.is_dir() else "is a file whose name does not end in .gguf"
    raise DataError(
        f"{path} is no model: it {what}. Give a run, a model folder, a Hugging Face folder or a GGUF file"
    )


def locate(name: str | Path) -> Path:
    """The path of a model; a name such as `HuggingFaceTB/SmolLM2-135M` is fetched from the Hugging Face hub.

    Errors: `MissingExtraError` for such a name without huggingface_hub; `DataError` where it cannot be had.
    """
    path = Path(name).expanduser()
    if path.exists() or not _is_hub_name(str(name)):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError(
            f"{name} is no path here; to fetch it from the Hugging Face hub: pip install 'moekit[hf]'"
        ) from None
    try:
        # */config.json are those of sentence-transformers' modules; weights in folders are copies in other forms
        wanted = [
            "*.safetensors",
            "*.safetensors.index.json",
            CONFIG,
            MODULES,
            f"*/{CONFIG}",
            *TOKENIZER_FILES,
        ]
        others = ["*/*.safetensors", "consolidated*.safetensors"]
        return Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=others))
    except Exception as error:  # the hub's client raises many kinds
        raise DataError(
            f"{name} is no path here, and the Hugging Face hub does not give it: {error}"
        ) from None


def open_model(name: str | Path, dtype: torch.dtype | None = torch.float32) -> OpenedModel:
    """Open a model.

    Args:
        name: a path (see `kind_of`), or a name on the Hugging Face hub.
        dtype: of its floating-point parameters; as stored where None.

    Errors: `DataError` where it is damaged or of an unknown architecture, `CheckpointError` for a run without a
    checkpoint.
    """
    path = locate(name)
    kind = kind_of(path)
    if kind == "run":
        from moekit.train.run import load_run

        run = load_run(path)
        history = _history_of_run(path, run.step)
        files = _tokenizer_files(path)
        model = run.model if dtype is None else run.model.to(dtype)
        return OpenedModel(model, path, kind, run.tokenizer, files, history, data=run.config.data)
    if kind == "gguf":
        return _open_gguf(path, dtype)
    files = _tokenizer_files(path)
    if kind == "huggingface" and is_encoder_folder(path):
        encoder, accounting = read_encoder_folder(path, dtype)
        return OpenedModel(encoder, path, kind, None, files, (), accounting)
    tokenizer = tokenizer_of(files)
    if kind == "moekit":
        described = read_description(path)
        model = read_model_folder(path, dtype)
        return OpenedModel(model, path, kind, tokenizer, files, described.history, data=described.data)
    model, accounting = read_hf_folder(path, dtype)
    return OpenedModel(model, path, kind, tokenizer, files, (), accounting)


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    return {file: folder / file for file in TOKENIZER_FILES if (folder / file).is_file()}


def _history_of_run(folder: Path, steps: int) -> tuple[Mapping[str, Any], ...]:
    """The steps that made a run's model: those of what it started from, and its training."""
    described = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    before = (described.get("started_from") or {}).get("history", [])
    return (*before, {"step": "trained", "run": folder.name, "steps": steps})


def tokenizer_of(files: Mapping[str, Path]) -> Tokenizer | None:
    """The tokenizer among a model's files; None where there is none that moekit reads."""
    if "tokenizer.json" not in files:
        return None
    try:
        return load_tokenizer(files["tokenizer.json"], exact=False)
    except (
        ConfigError
    ):  # it has no end marker: moekit cannot read text with it, its files are kept all the same
        return None


def _open_gguf(path: Path, dtype: torch.dtype | None) -> OpenedModel:
    from moekit.convert.formats.gguf.file import GgufFile
    from moekit.convert.formats.gguf.reading import read_gguf
    from moekit.convert.formats.gguf.tokenizer import read_tokenizer

    file = GgufFile(path)
    try:
        model, accounting, architecture = read_gguf(file, dtype)
        tokenizer, files = read_tokenizer(file.metadata, str(path))
    finally:
        file.close()
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise DataError(
            f"{path}: its tokenizer has {tokenizer.vocab_size:,} tokens, its embeddings have "
            f"{model.config.vocab_size:,} rows"
        )
    return OpenedModel(model, path, "gguf", tokenizer, files, (), accounting, architecture.name)


def _is_hub_name(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~"))
