"""Documents and what is done to them before tokenization: cut, deduplicate, trim, split. All deterministic.

A document has a domain (what it is: code, english, ...), a name that is unique in its corpus, and a group:
the original it was cut from. Groups, not documents, are dealt to the splits, so that no split ever sees a
part of an original that another split holds.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Document:
    """One text. `group` names the original that it is a piece of; the document itself where empty."""

    text: str
    domain: str
    name: str
    group: str = ""

    @property
    def original(self) -> str:
        return self.group or self.name

    @property
    def n_bytes(self) -> int:
        """Length in UTF-8, the denominator of bits per byte."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True)
class SourceInfo:
    """Where text came from, under which licence, and the hash that was checked (None where there is none)."""

    name: str
    origin: str
    licence: str
    sha256: str | None
    note: str = ""


@dataclass
class Corpus:
    """Documents in three splits; `held_out` is a domain that is never trained on."""

    train: list[Document]
    validation: list[Document]
    held_out: list[Document]
    sources: list[SourceInfo] = field(default_factory=list)


# Places to cut a long text, best first: before a heading of an act, before a top-level definition of Python,
# after an empty line, after a line, after a sentence, after a space.
_CUTS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"^(?=[ \t]*(?:ACT|Act|Actus|BOOK|THE [A-Z]+ BOOK)\b)",
        r"^(?=(?:@|def |class |async def ))",
        r"\n[ \t]*\n(?=.)",
        r"\n(?=.)",
        r"(?<=[.!?])[ ]+(?=[\"'A-Z])|(?<=[。！？])",
        r"(?<= )",
    )
)


def cut_text(text: str, max_bytes: int) -> list[str]:
    """Pieces of at most `max_bytes` UTF-8 bytes, cut at the best places, that join to `text` again.

    A cut is searched in the second half of each piece: headings of acts before definitions, empty lines,
    lines, sentences and spaces; a run without any of them is cut between characters.

    >>> cut_text("one two three", 8)
    ['one two ', 'three']
    """
    pieces = []
    start = 0
    while start < len(text):
        window = text[start : start + max_bytes]
        encoded = window.encode("utf-8")
        if len(encoded) <= max_bytes:
            if start + len(window) == len(text):
                pieces.append(window)
                break
        else:
            window = encoded[:max_bytes].decode("utf-8", errors="ignore")
        end = _best_cut(window)
        pieces.append(window[:end])
        start += end
    return pieces


def _best_cut(window: str) -> int:
    half = len(window) // 2
    for pattern in _CUTS:
        ends = [match.end() for match in pattern.finditer(window, half) if half < match.end() < len(window)]
        if ends:
            return ends[-1]
    return len(window)


def cut_documents(documents: Iterable[Document], max_bytes: int, own_groups: bool = False) -> list[Document]:
    """Cut every document longer than `max_bytes` into pieces named `name#1`, `name#2`, ..., all in its group.

    `own_groups` makes each piece an original of its own: for a domain of a single text, whose split must run
    through it.
    """
    result = []
    for document in documents:
        pieces = cut_text(document.text, max_bytes) if len(document.text) * 4 > max_bytes else [document.text]
        if len(pieces) == 1:
            result.append(document)
            continue
        for number, piece in enumerate(pieces, 1):
            group = "" if own_groups else document.original
            result.append(Document(piece, document.domain, f"{document.name}#{number}", group))
    return result


def remove_doubles(documents: Sequence[Document], overlap: float = 0.5) -> list[Document]:
    """Drop empty documents, exact doubles after normalisation, and documents mostly made of earlier ones.

    Normalisation: NFKC, lower case, single spaces. Near doubles: more than `overlap` of the characters of the
    lines (of very long lines: sentences) of 30 characters or more occur in documents that were kept before.
    The first one stays.

    >>> texts = ["To be, or  not to be", "to be, or not to be", "that is the question"]
    >>> [d.name for d in remove_doubles([Document(t, "en", str(i)) for i, t in enumerate(texts)])]
    ['0', '2']
    """
    seen_documents: set[str] = set()
    seen_lines: set[str] = set()
    kept = []
    for document in documents:
        text = document.text if document.text.isascii() else unicodedata.normalize("NFKC", document.text)
        normal = " ".join(text.lower().split())
        digest = hashlib.sha256(normal.encode("utf-8", errors="surrogatepass")).hexdigest()
        if not normal or digest in seen_documents:
            continue
        seen_documents.add(digest)
        lines = _telling_lines(document.text)
        known = sum(len(line) for line in lines if line in seen_lines)
        if known > overlap * max(1, sum(map(len, lines))):
            continue
        seen_lines.update(lines)
        kept.append(document)
    return kept


_SENTENCES = re.compile(r"(?<=[.!?])[ ]+|(?<=[。！？])")


def _telling_lines(text: str) -> list[str]:
    """Lines of 30 characters or more, long ones as sentences: enough to recognise a text by."""
    lines = []
    for line in text.split("\n"):
        if len(line) > 400:
            lines += [sentence for sentence in _SENTENCES.split(line) if len(sentence) >= 30]
        elif len(stripped := line.strip()) >= 30:
            lines.append(stripped)
    return lines


def _by_original(documents: Iterable[Document]) -> dict[str, list[Document]]:
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.original].append(document)
    return groups


def _draw(salt: str, name: str) -> str:
    """A random-looking sort key that depends on nothing but its arguments."""
    return hashlib.sha256(f"{salt}\0{name}".encode()).hexdigest()


def trim_documents(documents: Sequence[Document], max_bytes: int) -> list[Document]:
    """A fixed pseudo-random choice of whole originals of at most `max_bytes` UTF-8 bytes together.

    The choice depends on the names only, not on a seed, so that runs with different seeds train on the same
    text. A single original larger than the budget gives its first pieces.
    """
    if sum(document.n_bytes for document in documents) <= max_bytes:
        return list(documents)
    groups = _by_original(documents)
    left = max_bytes
    chosen: set[str] = set()
    for name in sorted(groups, key=lambda name: _draw("trim", name)):
        size = sum(document.n_bytes for document in groups[name])
        if size <= left:
            chosen |= {document.name for document in groups[name]}
            left -= size
    if not chosen:
        first = min(groups, key=lambda name: _draw("trim", name))
        for document in groups[first]:
            if document.n_bytes > left:
                break
            chosen.add(document.name)
            left -= document.n_bytes
    return [document for document in documents if document.name in chosen]


def split_documents(
    documents: Sequence[Document], validation_share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Deal originals to (train, validation) so that each domain gives about `validation_share` of its bytes.

    Originals are taken for validation in the order of a hash of (seed, name), passing over those that would
    overshoot the share by more than half. A domain of a single original goes to training whole.
    """
    domains: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        domains[document.domain].append(document)
    held: set[str] = set()
    for domain_documents in domains.values():
        groups = _by_original(domain_documents)
        sizes = {name: sum(document.n_bytes for document in group) for name, group in groups.items()}
        held |= _choose_validation(sizes, validation_share, seed)
    train = [document for document in documents if document.original not in held]
    validation = [document for document in documents if document.original in held]
    return train, validation


def _choose_validation(sizes: dict[str, int], share: float, seed: int) -> set[str]:
    target = share * sum(sizes.values())
    if len(sizes) < 2:
        return set()
    order = sorted(sizes, key=lambda name: _draw(f"split {seed}", name))
    chosen: set[str] = set()
    total = 0
    for name in order:
        if total >= 0.9 * target:
            break
        if total + sizes[name] <= 1.5 * target:
            chosen.add(name)
            total += sizes[name]
    if not chosen:
        # every original is larger than the share: the smallest comes nearest to it
        chosen = {min(order, key=lambda name: sizes[name])}
    return chosen
