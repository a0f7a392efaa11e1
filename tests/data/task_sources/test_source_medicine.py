"""Diagnoses of ICD-10-CM: codes below codes, chapters by title, categories in one split."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_source_samples import Folders, check_own_split, everything, rows

from moekit.config.errors import DataError
from moekit.data.task_sources.base import load_source
from moekit.data.task_sources.medicine import diagnoses


def diag(code: str, text: str, *inner: str, term: str = "") -> str:
    terms = f"<inclusionTerm><note>{term}</note></inclusionTerm>" if term else ""
    excluded = "<excludes1><note>not this (Z99)</note></excludes1>"
    return f"<diag><name>{code}</name><desc>{text}</desc>{terms}{excluded}{''.join(inner)}</diag>"


def tabular(*chapters: tuple[str, list[str]]) -> str:
    body = "".join(
        f"<chapter><name>{number}</name><desc>{title}</desc><sectionIndex/>"
        f'<section id="x"><desc>A section (A00-A09)</desc>{"".join(codes)}</section></chapter>'
        for number, (title, codes) in enumerate(chapters, 1)
    )
    head = '<?xml version="1.0" encoding="utf-8"?>\n<ICD10CM.tabular><version>2026</version><introduction/>'
    return f"{head}{body}</ICD10CM.tabular>"


def test_codes_below_codes_and_titles_without_their_range() -> None:
    inner = diag("A00.0", "Cholera due to\n  x &amp; y")
    xml = tabular(
        ("Certain infections (A00-B99)", [diag("A00", "Cholera", inner, term="Asiatic cholera")]),
        ("Malformations (lasting) (Q00-QA0)", [diag("Q00", "Anencephaly")]),
    )
    assert [tuple(diagnosis) for diagnosis in diagnoses(xml)] == [
        ("Cholera", "A00", "Certain infections"),
        ("Cholera due to x & y", "A00.0", "Certain infections"),
        ("Anencephaly", "Q00", "Malformations (lasting)"),
    ]
    assert [diagnosis.text for diagnosis in diagnoses(xml, terms=True)][:2] == ["Cholera", "Asiatic cholera"]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<ICD10CM.tabular><chapter>", "is no XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "declares entities"),
        (tabular(("A", ["<diag><name>A00</name></diag>"])), "has a diag without a desc"),
    ],
)
def test_another_file_is_refused(xml: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(diagnoses(xml))


@pytest.mark.parametrize("terms", [False, True])
def test_categories_stay_together(tmp_path: Path, terms: bool) -> None:
    chapters = []
    for letter, title in (("A", "Infections (A00-A99)"), ("S", "Injuries (S00-S99)")):
        codes = []
        for i in range(20):
            inner = [diag(f"{letter}{i:02d}.{j}", f"kind {j} of {letter}{i}") for j in range(3)]
            codes.append(
                diag(f"{letter}{i:02d}", f"all of {letter}{i}", *inner, term=f"other name {letter}{i}")
            )
        codes.append(diag(f"{letter}98", "said of both"))
        codes.append(diag(f"{letter}99", f"all of {letter}1"))
        chapters.append((title, codes))
    files = {"simple_icd_10_cm/data/icd10c.xml": tabular(*chapters)}
    data = load_source("icd10", {"terms": terms}, Folders(tmp_path, {"simple-icd-10-cm": files}))  # type: ignore[arg-type]
    check_own_split(data, "category")
    assert len(everything(data, "text")) == (200 if terms else 160)
    assert "2 doubles, 2 of a text under two labels" in data.sources[0].note
    for row in rows(data.train) + rows(data.test):
        assert row["category"] == row["code"][:3]
        assert row["label"] == {"A": "Infections", "S": "Injuries"}[row["code"][0]]
    assert set(data.test["label"]) == {"Infections", "Injuries"}
