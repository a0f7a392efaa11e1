"""Knowledge graphs: given parts as they are; WordNet without its inverses and without pairs in two parts."""

from __future__ import annotations

import itertools

import pytest
from source_samples import fetcher_of

from moekit.config.errors import ConfigError, DataError
from moekit.data.task_sources import wordnet
from moekit.data.task_sources.graphs import kinships, read_triples

# As in the real files: a licence on top, two hexadecimal digits of words, three decimal ones of pointers, the gloss.
# dog (two senses) under canine under animal; cat beside dog; fast = quick; the verb dog comes from the noun.
NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
00000001 05 n 01 animal 0 002 ~ 00000002 n 0000 ~ 00000005 n 0000 | a living organism
00000002 05 n 01 canine 0 003 @ 00000001 n 0000 ~ 00000003 n 0000 %m 00000006 n 0000 | of a family | of many
00000003 05 n 02 dog 0 Domestic_dog 0 002 @ 00000002 n 0000 + 00000001 v 0101 | a pet
00000004 18 n 01 dog 1 001 @i 00000001 n 0000 | a dull girl
00000005 05 n 01 Cat 0 002 @ 00000001 n 0000 ! 00000003 n 0101 | a pet
00000006 14 n 0a pack 0 a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 001 #m 00000002 n 0000 | ten words
"""
VERBS = """\
00000001 38 v 01 dog 0 003 + 00000003 n 0101 * 00000002 v 0000 ;u 00000006 n 0000 01 + 08 00 | go after
00000002 38 v 01 move 0 000 01 + 08 00 | go
"""
ADJECTIVES = """\
00000001 00 a 01 quick 0 001 & 00000002 a 0000 | not slow
00000002 00 s 01 Fast(p) 0 001 & 00000001 a 0000 | not slow
"""
FILES = {
    "data.noun": NOUNS,
    "data.verb": VERBS,
    "data.adj": ADJECTIVES,
    "data.adv": "",
    "index.noun": "  1 This software\nanimal n 1 1 ~ 1 0 00000001\ncanine n 1 2 @ ~ 1 0 00000002\n"
    "dog n 2 1 @ 2 1 00000003 00000004  \ncat n 1 1 @ 1 0 00000005\npack n 1 1 #m 1 0 00000006\n",
    "index.verb": "dog v 1 2 + * 1 0 00000001\nmove v 1 0 1 0 00000002\n",
    "index.adj": "quick a 1 1 & 1 0 00000001\nfast a 1 1 & 1 0 00000002\n",
    "index.adv": "",
}


def package(tmp_path, **changes: str):
    files = {**FILES, **{name.replace("_", "."): text for name, text in changes.items()}}
    fetch = fetcher_of(
        tmp_path, {"wordnet-base": {f"usr/share/wordnet/{name}": text for name, text in files.items()}}
    )
    return fetch(wordnet.WORDNET)


def test_a_relation_comes_once_whatever_way_the_files_tell_it(tmp_path) -> None:
    assert wordnet.read_wordnet(package(tmp_path)) == [
        ("canine.n.1", "hypernym", "animal.n.1"),
        ("cat.n.1", "antonym", "dog.n.1"),
        ("cat.n.1", "hypernym", "animal.n.1"),
        ("dog.n.1", "derivationally_related", "dog.v.1"),
        ("dog.n.1", "hypernym", "canine.n.1"),
        ("dog.n.2", "instance_hypernym", "animal.n.1"),
        ("dog.v.1", "entailment", "move.v.1"),
        ("dog.v.1", "usage_domain", "pack.n.1"),
        ("fast.a.1", "similar_to", "quick.a.1"),
        ("pack.n.1", "member_holonym", "canine.n.1"),
    ]


def test_broken_files_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"data\.verb:2: not a line"):
        wordnet.read_wordnet(package(tmp_path, data_verb=VERBS.splitlines()[0] + "\n00000002 38 v\n"))
    with pytest.raises(DataError, match=r"index\.verb has no 'dog'"):
        wordnet.read_wordnet(package(tmp_path, index_verb="move v 1 0 1 0 00000002\n"))


def test_a_smaller_graph_is_between_the_best_connected() -> None:
    star = [("hub", "r", f"leaf{i}") for i in range(9)]
    core = [(a, "r", b) for a, b in itertools.combinations(["hub", "x", "y", "z"], 2)]
    assert wordnet.best_connected(sorted(star + core), 6) == sorted(core)


def test_pairs_stay_together_and_held_senses_are_known() -> None:
    names = [f"s{i:02d}" for i in range(40)]
    triples = sorted(
        {(a, "up", b) for a, b in itertools.combinations(names, 2) if int(a[1:]) % 3 == 0}
        | {(b, "beside", a) for a, b in itertools.combinations(names, 2) if int(b[1:]) % 2}
        | {(f"only{i}", "up", "s00") for i in range(50)}
        | {("s01", "rare", "s02")}
    )
    parts = wordnet.split_triples(triples)
    rows = [list(zip(part["head"], part["relation"], part["tail"], strict=True)) for part in parts]
    assert sorted(itertools.chain(*rows)) == triples
    assert all(len(part) > 0.02 * len(triples) for part in rows)
    pairs = [{frozenset((head, tail)) for head, _, tail in part} for part in rows]
    assert all(not (one & other) for one, other in itertools.combinations(pairs, 2))
    known = {value for triple in rows[0] for value in triple}
    assert all(known.issuperset(triple) for part in rows[1:] for triple in part)


def test_too_few_triples_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"max_triples must be at least 100, or null for all; got 3"):
        wordnet.wordnet(lambda _: package(tmp_path), max_triples=3)


def test_given_parts_are_taken_as_they_are(tmp_path) -> None:
    files = {
        f"pykeen/datasets/kinships/{part}.txt": f"a\tterm1\t{part}\n" for part in ("train", "valid", "test")
    }
    data = kinships(fetcher_of(tmp_path, {"pykeen": files}))
    assert [part["tail"] for part in (data.train, data.validation, data.test)] == [
        ["train"],
        ["valid"],
        ["test"],
    ]
    assert data.given_test


@pytest.mark.parametrize("line", ["a\tb", "a\tb\tc\td", "a\t\tc", ""])
def test_what_is_no_triple_names_its_line(line) -> None:
    with pytest.raises(DataError, match=r"few:2: must be head, relation and tail"):
        read_triples(f"a\tr\tb\n{line}\na\tr\tb\n", "few")
