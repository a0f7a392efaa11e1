"""What `moekit data describe` finds in a corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moekit.config.data import DataConfig
from moekit.config.errors import ConfigError, nearest
from moekit.config.loading import load_run_config
from moekit.data.corpora import CORPORA, load_corpus


def data_config(source: str, overrides: Sequence[str]) -> DataConfig:
    """The data of a named corpus, a YAML configuration or a path of text, with `data.` overrides."""
    path = Path(source)
    if source in CORPORA:
        return load_run_config(None, overrides, {"data": {"corpus": source}}).data
    if path.suffix in (".yaml", ".yml"):
        return load_run_config(path, overrides).data
    if path.exists():
        return load_run_config(None, overrides, {"data": {"path": source}}).data
    raise ConfigError(
        f"{source!r} is no named corpus, no YAML configuration and no path: {nearest(source, CORPORA)}"
    )


def described(source: str, overrides: Sequence[str], progress: Callable[[str], None]) -> dict[str, Any]:
    """Documents and bytes by domain and split, and the sources with origin, licence and hash. JSON-ready."""
    corpus = load_corpus(data_config(source, overrides), progress)
    splits = {"train": corpus.train, "validation": corpus.validation, "held_out": corpus.held_out}
    domains = sorted({document.domain for documents in splits.values() for document in documents})
    table: dict[str, Any] = {
        domain: {split: {"documents": 0, "bytes": 0} for split in splits} for domain in domains
    }
    for split, documents in splits.items():
        for document in documents:
            table[document.domain][split]["documents"] += 1
            table[document.domain][split]["bytes"] += document.n_bytes
    return {"domains": table, "sources": [asdict(source) for source in corpus.sources]}
