"""The routing record: what routers decided, as sums and, where wanted, token by token; two files in a folder.

    routing.json          version, source, layers, groups, what else was said of it
    routing.safetensors   the arrays that are listed below

Shape legend: G groups of tokens (domains), E choices of a layer (null experts behind the real ones), S moments of
training, N tokens with a row of their own, K most choices of a token in a layer.

| array | shape | what |
| --- | --- | --- |
| `tokens` | `[G]` | tokens that counted |
| `L/counts`, `L/weights` | `[G, E]` | rows that experts of layer L answered, their combine weights added up |
| `L/probs` | `[G, E]` | router probabilities added up; zeros where the router has none |
| `L/entropy`, `L/margin` | `[G]` | sums over tokens: entropy in nats, lead of the largest probability |
| `L/requested`, `L/dropped` | `[E]`, `[1]` | choices before capacity, choices that found their expert full |
| `L/violation` | `[2]` | max violation of each batch added up, and the number of batches |
| `L/pairs` | `[E, E]` | tokens that chose both experts; on the diagonal, tokens that chose the one |
| `L/flow` | `[E, E]` | tokens by their heaviest expert in layer L and in the next one; the last layer has none |
| `history/step` | `[S]` | optimizer steps |
| `L/history`, `L/history_entropy` | `[S, E]`, `[S]` | choices since the moment before, mean entropy of a token |
| `token/id`, `token/target`, `token/predicted` | `[N]` | vocabulary ids: read, to be predicted, predicted; -1 unknown |
| `token/group`, `token/text`, `token/position`, `token/step` | `[N]` | where the token stands, and when it was read |
| `L/token/experts`, `L/token/weights` | `[N, K]` | choices, the heaviest first; -1 and 0 behind the last |
| `L/token/entropy`, `L/token/margin` | `[N]` | of the token |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from moekit.config.atomic import json_ready, write_bytes, write_text
from moekit.config.errors import DataError, require

VERSION = 1
JSON_FILE, ARRAYS_FILE = "routing.json", "routing.safetensors"


@dataclass(frozen=True)
class LayerInfo:
    """A sparse layer: its name in the model, choices E, router; names of experts, where they have some."""

    name: str
    n_experts: int
    router: str
    expert_names: tuple[str, ...] = ()
    n_null_experts: int = 0

    def label(self, expert: int) -> str:
        """What a reader calls an expert."""
        if self.expert_names:
            return self.expert_names[expert]
        real = self.n_experts - self.n_null_experts
        return str(expert) if expert < real else f"null {expert - real}"


@dataclass(frozen=True)
class RoutingRecord:
    """See the table above.

    Attributes:
        layers: the sparse layers, the first one first.
        groups: names of the G groups; one "all" where tokens have none.
        source: "training", "evaluation", "prediction", "generation" or "foreign".
        arrays: by the names of the table.
        info: what else is known: run, step, tokenizer, sampling, tables of words; JSON-ready.
    """

    layers: tuple[LayerInfo, ...]
    groups: tuple[str, ...]
    source: str
    arrays: Mapping[str, np.ndarray]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Tokens that counted."""
        return int(self.arrays["tokens"].sum())

    @property
    def n_token_rows(self) -> int:
        """N."""
        return len(self.arrays["token/id"]) if "token/id" in self.arrays else 0

    def of(self, layer: int, name: str) -> np.ndarray:
        """An array of a layer, such as `of(0, "counts")`."""
        return self.arrays[f"{layer}/{name}"]

    def has(self, layer: int, name: str) -> bool:
        """Whether the record has the array."""
        return f"{layer}/{name}" in self.arrays

    def counts(self, layer: int) -> np.ndarray:
        """`[E]` rows of each expert over all groups."""
        return np.asarray(self.of(layer, "counts").sum(axis=0))

    def save(self, folder: Path | str) -> Path:
        """Write both files, the one that names the other last; returns the folder."""
        folder = Path(folder)
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        write_bytes(folder / ARRAYS_FILE, save(arrays))
        said = {
            "version": VERSION, "source": self.source, "groups": self.groups,
            "layers": [asdict(one) for one in self.layers], "info": self.info,
            "tokens": self.n_tokens, "token_rows": self.n_token_rows,
        }  # fmt: skip
        text = json.dumps(json_ready(said), indent=1, ensure_ascii=False, allow_nan=False)
        write_text(folder / JSON_FILE, text + "\n")
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> RoutingRecord:
        """Read a folder.

        Errors: `DataError` for a folder without a record, one of a newer version, or files that do not fit together.
        """
        folder = Path(folder)
        if not (folder / JSON_FILE).is_file():
            raise DataError(f"{folder} holds no routing record: it has no {JSON_FILE}")
        try:
            said = json.loads((folder / JSON_FILE).read_text("utf-8"))
            version = int(said["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / JSON_FILE} is no routing record: {error}") from None
        if version > VERSION:
            raise DataError(
                f"{folder / JSON_FILE} has version {version}; this moekit reads up to {VERSION}. Install a newer one"
            )
        try:
            arrays = load_file(folder / ARRAYS_FILE)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder / ARRAYS_FILE} cannot be read: {error}. Record again") from None
        try:
            layers = tuple(
                LayerInfo(**{**one, "expert_names": tuple(one.get("expert_names", ()))})
                for one in said["layers"]
            )
            record = cls(layers, tuple(said["groups"]), said["source"], arrays, said.get("info", {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / JSON_FILE} is no routing record: {error}") from None
        record.check()
        return record

    def check(self) -> None:
        """Errors: `DataError` where arrays are missing or have other shapes than layers and groups say."""
        n_groups = len(self.groups)
        wanted: dict[str, tuple[int, ...]] = {"tokens": (n_groups,)}
        for number, layer in enumerate(self.layers):
            wanted |= {
                f"{number}/counts": (n_groups, layer.n_experts), f"{number}/weights": (n_groups, layer.n_experts),
                f"{number}/requested": (layer.n_experts,),
            }  # fmt: skip
        for name, shape in wanted.items():
            found = self.arrays[name].shape if name in self.arrays else None
            if found != shape:
                raise DataError(f"routing record: {name} must have shape {list(shape)}; got {found}")

    def __add__(self, other: RoutingRecord) -> RoutingRecord:
        """Both records together. Errors: `ConfigError` where layers or groups differ."""
        require(self.layers == other.layers, "layers", len(other.layers), "must be those of the other record")
        require(self.groups == other.groups, "groups", other.groups, f"must be {self.groups}")
        arrays: dict[str, np.ndarray] = {}
        for name in {**self.arrays, **other.arrays}:
            if name not in self.arrays or name not in other.arrays:
                # sums of one side alone would speak of a part of the tokens
                if _is_joined(name):
                    arrays[name] = (self if name in self.arrays else other).arrays[name]
                continue
            mine, yours = self.arrays[name], other.arrays[name]
            arrays[name] = joined(mine, yours) if _is_joined(name) else mine + yours
        return RoutingRecord(self.layers, self.groups, self.source, arrays, {**self.info, **other.info})


def _is_joined(name: str) -> bool:
    return "token/" in name or "history" in name


def joined(*parts: np.ndarray) -> np.ndarray:
    """Rows of all; narrower ones filled up with what stands behind a token's last choice.

    >>> joined(np.array([[3]], dtype=np.int16), np.array([[1, 2]], dtype=np.int16)).tolist()
    [[3, -1], [1, 2]]
    """
    wide = max(part.shape[1] if part.ndim == 2 else 0 for part in parts)
    empty = -1 if np.issubdtype(parts[0].dtype, np.integer) else 0
    return np.concatenate([
        part if part.ndim != 2 or part.shape[1] == wide
        else np.pad(part, ((0, 0), (0, wide - part.shape[1])), constant_values=empty)
        for part in parts
    ])  # fmt: skip
