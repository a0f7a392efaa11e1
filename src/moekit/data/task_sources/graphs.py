"""Knowledge graphs as triples with given splits: UMLS, Kinships, Nations."""

from __future__ import annotations

from moekit.config.errors import DataError
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData
from moekit.data.registry import PackageFolder
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.origin import origin_of

PYKEEN = Package(
    client="pip-wheel",
    name="pykeen",
    version="1.11.1",
    digest="sha256:b6cc0ab012fc6ba4f37b58fb7081a409a5c1f04cbbb0e0e9c2256e911757d4ba",
    members=(
        *(
            f"pykeen/datasets/{name}/{part}.txt"
            for name in ("umls", "kinships", "nations")
            for part in ("train", "valid", "test")
        ),
        "*/LICENSE",
    ),
)
TRIPLE = {"head": "an entity", "relation": "from head to tail", "tail": "an entity"}
_LICENCE = "MIT (the package; it states none of their own for the triples)"


@register_source(
    "umls", "6,529 relations between 135 kinds of medical concepts", columns=TRIPLE, licence=_LICENCE
)
def umls(fetch: Fetcher) -> TaskData:
    """The given parts; every entity and relation occurs in training."""
    return _given(
        fetch(PYKEEN), "umls", "the semantic network of the Unified Medical Language System, 46 relations"
    )


@register_source(
    "kinships",
    "10,686 terms of kinship between 104 people of the Alyawarra",
    columns=TRIPLE,
    licence=_LICENCE,
)
def kinships(fetch: Fetcher) -> TaskData:
    """The given parts; every entity and relation occurs in training."""
    return _given(fetch(PYKEEN), "kinships", "kinship terms of the Alyawarra (Denham, 1973), 25 relations")


@register_source(
    "nations", "1,992 relations between 14 nations, 1950 to 1965", columns=TRIPLE, licence=_LICENCE
)
def nations(fetch: Fetcher) -> TaskData:
    """The given parts; every entity and relation occurs in training."""
    return _given(fetch(PYKEEN), "nations", "dimensionality of nations (Rummel, 1950 to 1965), 55 relations")


def _given(package: PackageFolder, name: str, described: str) -> TaskData:
    train, validation, test = (
        read_triples(package.read_text(f"pykeen/datasets/{name}/{part}.txt"), f"{name}/{part}.txt")
        for part in ("train", "valid", "test")
    )
    info = origin_of(
        PYKEEN, described, _LICENCE, "train, validation and test as given; no triple stands in two"
    )
    return TaskData(train, validation, test, sources=[info], given_test=True)


def read_triples(text: str, name: str) -> Examples:
    r"""Triples of a file with `head <tab> relation <tab> tail` on each line.

    Errors: `DataError` with the line that is no triple.

    >>> read_triples("alga\tisa\tentity\n", "few.txt")["relation"]
    ['isa']
    """
    rows = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        fields = line.split("\t")
        if len(fields) != 3 or not all(fields):
            raise DataError(
                f"{name}:{number}: must be head, relation and tail with tabs between them; got {line!r}"
            )
        rows.append(fields)
    heads, relations, tails = ([row[i] for row in rows] for i in range(3))
    return Examples({"head": heads, "relation": relations, "tail": tails})
