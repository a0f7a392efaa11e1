"""Diagnoses by chapter: the descriptions of ICD-10-CM, the classification of diseases as used in the United States.

The package (simple-icd-10-cm) carries the tabular list of April 2026 as the Centers for Disease Control publish it: XML
of chapters, sections and codes, a code below the code that it refines, each with a description and often with other
names of the same ("inclusion terms"). Descriptions of codes below one three-character category are much alike
("..., right ear", "..., left ear"), so a category stands in one split only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple
from xml.etree import ElementTree

from moekit.config.errors import DataError
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.own_split import info_of, own_split, without_doubles

ICD10 = Package(
    client="pip-wheel",
    name="simple-icd-10-cm",
    version="1.5.0",
    digest="sha256:6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    members=("simple_icd_10_cm/data/*.xml", "*/licenses/LICENSE"),
)


class Diagnosis(NamedTuple):
    """A name of a diagnosis, its code, and the title of its chapter."""

    text: str
    code: str
    chapter: str


@register_source(
    "icd10",
    "about 46,000 descriptions of diagnoses under 22 chapters of ICD-10-CM",
    columns={
        "text": "the description",
        "label": "the title of the chapter",
        "code": "the code",
        "category": "its first three characters",
    },
    licence="MIT (the package); the classification is a work of the government of the United States",
)
def icd10(fetch: Fetcher, terms: bool = False) -> TaskData:
    """Diagnoses by chapter.

    Args:
        terms: add the other names of the diagnoses (inclusion terms), about 12,000 more texts.
    """
    package = fetch(ICD10)
    name = next(name for name in package.files if name.endswith(".xml"))
    found = list(diagnoses(package.read_text(name), terms))
    examples = Examples(
        {
            "text": [diagnosis.text for diagnosis in found],
            "label": [diagnosis.chapter for diagnosis in found],
            "code": [diagnosis.code for diagnosis in found],
            "category": [diagnosis.code[:3] for diagnosis in found],
        }
    )
    examples, left_out = without_doubles(examples)
    data, note = own_split(examples, by="label", together="category")
    largest, count = Counter(examples["label"]).most_common(1)[0]
    note = f"{len(found)} texts; {left_out}; {note}; {count / len(examples):.0%} are of {largest!r}"
    licence = "MIT (the package); the classification is published by the CDC, a work of the United States government"
    origin = "PyPI; ICD-10-CM of April 2026, Centers for Disease Control"
    return replace(data, sources=[info_of(ICD10, origin, licence, note)])


def diagnoses(xml: str, terms: bool = False) -> Iterator[Diagnosis]:
    """The diagnoses of a tabular list, chapter by chapter; with `terms`, their other names too.

    >>> code = "<diag><name>A57</name><desc>Chancroid</desc></diag>"
    >>> chapter = f"<chapter><name>1</name><desc>Infections (A00-B99)</desc><section>{code}</section></chapter>"
    >>> next(diagnoses(f"<ICD10CM.tabular>{chapter}</ICD10CM.tabular>"))
    Diagnosis(text='Chancroid', code='A57', chapter='Infections')
    """
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise DataError("the tabular list declares entities; it is not the one that is known")
    try:
        root = ElementTree.fromstring(xml.encode("utf-8"))
    except ElementTree.ParseError as error:
        raise DataError(f"the tabular list is no XML: {error}") from None
    for chapter in root.iter("chapter"):
        title = re.sub(r"\s*\([A-Z]\w{2}-[A-Z]\w{2}\)$", "", _text(chapter, "desc"))
        for diagnosis in chapter.iter("diag"):
            code = _text(diagnosis, "name")
            texts = [_text(diagnosis, "desc")]
            if terms:
                texts += [_clean(note.text) for note in diagnosis.findall("inclusionTerm/note")]
            for text in texts:
                yield Diagnosis(text, code, title)


def _text(element: ElementTree.Element, name: str) -> str:
    text = element.findtext(name)
    if not text:
        raise DataError(f"the tabular list has a {element.tag} without a {name}")
    return _clean(text)


def _clean(text: str | None) -> str:
    return " ".join((text or "").split())
