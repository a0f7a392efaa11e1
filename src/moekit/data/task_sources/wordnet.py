"""WordNet as a knowledge graph: triples between senses of words, read from the database files of WordNet 3.0.

The format is that of the manual page wndb(5WN): a line of a data file is a sense (synset) with its words and pointers
to other senses, and a line of an index file is a word with its senses, the most frequent first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from moekit.config.errors import DataError, require
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.registry import PackageFolder
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.origin import origin_of

WORDNET = Package(
    client="apt",
    name="wordnet-base",
    version="1:3.0-37",
    digest="sha256:61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    members=("usr/share/wordnet/data.*", "usr/share/wordnet/index.*", "*/copyright"),
)
PARTS_OF_SPEECH = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
# WordNet stores most relations in both directions, under two pointers. One of them is kept: with both, a test triple
# could be answered by turning a training triple round.
ONE_WAY = {
    "@": "hypernym",
    "@i": "instance_hypernym",
    "#m": "member_holonym",
    "#s": "substance_holonym",
    "#p": "part_holonym",
    ";c": "topic_domain",
    ";r": "region_domain",
    ";u": "usage_domain",
    "*": "entailment",
    ">": "cause",
}
# these mean the same in both directions; the direction from the earlier name is kept
BOTH_WAYS = {
    "&": "similar_to", "$": "verb_group", "^": "also_see", "=": "attribute", "+": "derivationally_related",
    "!": "antonym",
}  # fmt: skip
HELD_SHARE = 0.05
_SEED = 0

Triple = tuple[str, str, str]


@register_source(
    "wordnet",
    "relations between senses of English words: 40,000 of the best connected ones, up to 180,000",
    columns={"head": "a sense, such as dog.n.1", "relation": "from head to tail", "tail": "a sense"},
    licence="WordNet licence (any use, with its notice)",
)
def wordnet(fetch: Fetcher, max_triples: int | None = 40_000) -> TaskData:
    """Triples, 5% of them each for validation and test.

    Two senses that are related are related in one part only, whatever the relation and the direction, and what is
    held has senses and relations that occur in training.

    Args:
        fetch: gets the package.
        max_triples: at most so many, between the senses that have the most relations; all where None.
    """
    require(max_triples is None or max_triples >= 100, "data.options.max_triples", max_triples,
            "must be at least 100, or null for all")  # fmt: skip
    triples = read_wordnet(fetch(WORDNET))
    share = f"{len(triples):,} triples"
    if max_triples is not None and max_triples < len(triples):
        share = f"{max_triples:,} of {share}, those between the best connected senses"
        triples = best_connected(triples, max_triples)
    train, validation, test = split_triples(triples)
    info = origin_of(
        WORDNET,
        "WordNet 3.0, Princeton University",
        "WordNet 3.0 licence: use, copying, modification and distribution for any purpose, with its notice",
        f"{share}; of inverse and symmetric relations one direction; no parts are given: 5% each drawn with a fixed "
        "seed, related pairs kept together, and back to training what alone knows a sense. Not WN18 or WN18RR: "
        "their figures do not compare",
    )
    return TaskData(train, validation, test, [info])


def read_wordnet(package: PackageFolder) -> list[Triple]:
    """All triples, sorted, each pair of senses and relation once."""
    texts = {name.rsplit("/", 1)[-1]: package.read_text(name) for name in package.files}
    names: dict[str, str] = {}
    pointers = []
    for file, letter in PARTS_OF_SPEECH.items():
        senses = sense_numbers(texts[f"index.{file}"])
        for offset, word, found in read_synsets(texts[f"data.{file}"], f"data.{file}"):
            sense = letter + offset
            number = senses.get((word, offset))
            if number is None:
                raise DataError(f"index.{file} has no {word!r} with the sense {offset} of data.{file}")
            names[sense] = f"{word}.{letter}.{number}"
            pointers += [(sense, symbol, target) for symbol, target in found]
    triples = set()
    for sense, symbol, target in pointers:
        head, tail = names[sense], names[target]
        if head == tail:
            continue
        if symbol in ONE_WAY:
            triples.add((head, ONE_WAY[symbol], tail))
        elif symbol in BOTH_WAYS:
            triples.add((min(head, tail), BOTH_WAYS[symbol], max(head, tail)))
    return sorted(triples)


def read_synsets(text: str, name: str) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """(offset, first word in lower case, pointers as (symbol, part of speech + offset)) of each line of a data file.

    Errors: `DataError` with the line that does not have the format.

    >>> line = "00001740 03 n 01 Entity 0 001 ~ 00001930 n 0000 | that which is\\n"
    >>> list(read_synsets(line, "data.noun"))
    [('00001740', 'entity', [('~', 'n00001930')])]
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("  "):  # the licence, at the top
            continue
        fields = line.partition(" | ")[0].split()
        try:
            n_words = int(fields[3], 16)
            start = 4 + 2 * n_words
            n_pointers = int(fields[start])
            # words of adjectives may end in a mark of where they stand: afraid(p)
            word = fields[4].partition("(")[0].lower()
            pointers = [
                (fields[place], fields[place + 2].replace("s", "a") + fields[place + 1])
                for place in range(start + 1, start + 1 + 4 * n_pointers, 4)
            ]
        except (IndexError, ValueError):
            raise DataError(f"{name}:{number}: not a line of a WordNet data file: {line[:60]!r}") from None
        yield fields[0], word, pointers


def sense_numbers(text: str) -> dict[tuple[str, str], int]:
    """The number of the sense, from 1, by (word, offset) of the lines of an index file.

    >>> sense_numbers("thing n 2 2 @ ~ 2 1 00002452 09367203  \\n")
    {('thing', '00002452'): 1, ('thing', '09367203'): 2}
    """
    found = {}
    for line in text.split("\n"):
        if line and not line.startswith("  "):
            fields = line.split()
            for number, offset in enumerate(fields[-int(fields[2]) :], 1):
                found[fields[0], offset] = number
    return found


def best_connected(triples: list[Triple], at_most: int) -> list[Triple]:
    """At most so many triples, those between the senses of the highest degree: a small graph is still a dense one."""
    degrees = Counter(sense for head, _, tail in triples for sense in (head, tail))
    rank = {sense: i for i, sense in enumerate(sorted(degrees, key=lambda sense: (-degrees[sense], sense)))}
    ordered = sorted(triples, key=lambda triple: (max(rank[triple[0]], rank[triple[2]]), triple))
    return sorted(ordered[:at_most])


def split_triples(triples: list[Triple]) -> list[Examples]:
    """[train, validation, test]; what would bring a sense or a relation that training has not goes to training."""
    columns: dict[str, list[Any]] = {
        "head": [triple[0] for triple in triples],
        "relation": [triple[1] for triple in triples],
        "tail": [triple[2] for triple in triples],
        "pair": [" ".join(sorted((triple[0], triple[2]))) for triple in triples],
        "row": list(range(len(triples))),
    }
    parts = split_examples(Examples(columns), [HELD_SHARE, HELD_SHARE], _SEED, together="pair")
    rows = [list(part["row"]) for part in parts]
    known = {value for row in rows[0] for value in triples[row]}
    by_pair = columns["pair"]
    back = {by_pair[row] for part in rows[1:] for row in part if not known.issuperset(triples[row])}
    rows[0] += [row for part in rows[1:] for row in part if by_pair[row] in back]
    rows[1:] = [[row for row in part if by_pair[row] not in back] for part in rows[1:]]
    plain = Examples({name: columns[name] for name in ("head", "relation", "tail")})
    return [plain.rows(sorted(part)) for part in rows]
