"""From a configuration to tokenized splits, cached so that the second run starts at once."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from moekit.config.atomic import cache_folder, new_folder
from moekit.config.data import DataConfig
from moekit.config.errors import DataError
from moekit.data.corpora import build_corpus, resolve
from moekit.data.documents import SourceInfo
from moekit.data.packing import TokenizedSplit, pack
from moekit.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_SPLITS = ("train", "validation", "held_out")
_PREPARED_VERSION = 1


@dataclass(frozen=True)
class PreparedData:
    """Everything that training and evaluation read.

    Attributes: train, validation: the same domains in both; no document, and no piece of one, in two splits.
        held_out: a domain that was not trained on; empty where none was named. tokenizer: trained on `train`
        only, unless the configuration named one. sources: origin and licence of the text. fingerprint: sha256
        over the tokens, domains and tokenizer; equal exactly where a model sees the same data.
    """

    train: TokenizedSplit
    validation: TokenizedSplit
    held_out: TokenizedSplit
    tokenizer: Tokenizer
    sources: list[SourceInfo]
    fingerprint: str


def prepare(config: DataConfig, progress: Callable[[str], None] | None = None) -> PreparedData:
    """Fetch, read, split, train the tokenizer and tokenize, or read all of it from the cache.

    The cache lies in $MOEKIT_CACHE/prepared under a hash of everything that it depends on; it is written
    atomically, and what is damaged in it is made again.

    Args:
        config: what text, which split, which tokenizer.
        progress: called with a line of text whenever something begins that takes time.

    Raises:
        ConfigError, DataError, MissingExtraError: as the sources do.
    """
    report = progress if progress is not None else (lambda message: None)
    resolved = resolve(config, report)
    key = _cache_key(config, resolved.key)
    folder = cache_folder() / "prepared" / key
    cached = _load(folder)
    if cached is not None:
        return cached
    corpus = build_corpus(config, resolved.load())
    sizes: Counter[str] = Counter()
    for document in corpus.train:
        sizes[document.domain] += document.n_bytes
    report(
        "text to train on: "
        + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(sizes.items()))
    )
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        report(f"training a tokenizer of {config.vocab_size} tokens")
        tokenizer = train_tokenizer(corpus.train, config.vocab_size)
    report("tokenizing")
    domains = sorted({document.domain for document in corpus.train})
    data = PreparedData(
        train=pack(corpus.train, tokenizer, domains),
        validation=pack(corpus.validation, tokenizer, domains),
        held_out=pack(corpus.held_out, tokenizer),
        tokenizer=tokenizer,
        sources=corpus.sources,
        fingerprint="",
    )
    data = PreparedData(**{**vars(data), "fingerprint": _fingerprint(data)})
    try:
        _store(data, folder)
    except OSError as error:
        report(f"the prepared data could not be kept for the next run: {error}")
    return data


def _cache_key(config: DataConfig, text_key: str) -> str:
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer).fingerprint()
    parts = {
        "version": _PREPARED_VERSION,
        "text": text_key,
        "tokenizers": metadata.version("tokenizers"),
        "tokenizer": tokenizer,
        "vocab_size": config.vocab_size,
        "split": [
            config.split_seed,
            config.validation_share,
            config.max_bytes_per_domain,
            config.held_out_domain,
        ],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _fingerprint(data: PreparedData) -> str:
    hasher = hashlib.sha256(data.tokenizer.fingerprint().encode())
    for name in _SPLITS:
        split: TokenizedSplit = getattr(data, name)
        hasher.update(json.dumps([name, split.domains, split.end_id]).encode())
        for array in (split.tokens, split.offsets, split.domain_index, split.n_bytes):
            hasher.update(str(array.dtype).encode())
            hasher.update(array.tobytes())
    return hasher.hexdigest()


def _store(data: PreparedData, final: Path) -> None:
    with new_folder(final, is_whole=lambda: _load(final) is not None) as folder:
        data.tokenizer.save(folder / "tokenizer.json")
        for name in _SPLITS:
            getattr(data, name).save(folder / f"{name}.safetensors")
        described = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "fingerprint": data.fingerprint,
            "sources": [asdict(source) for source in data.sources],
        }
        (folder / "prepared.json").write_text(
            json.dumps(described, indent=1, ensure_ascii=False), encoding="utf-8"
        )


def _load(folder: Path) -> PreparedData | None:
    try:
        described = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        data = PreparedData(
            **{name: TokenizedSplit.load(folder / f"{name}.safetensors") for name in _SPLITS},
            tokenizer=load_tokenizer(folder / "tokenizer.json"),
            sources=[SourceInfo(**source) for source in described["sources"]],
            fingerprint=described["fingerprint"],
        )
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return data if _fingerprint(data) == data.fingerprint else None
