"""Packing and batches: targets by hand, each token once, streams that go on, exact positions."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import numbered
from hypothesis import given
from hypothesis import strategies as st

from moekit.config.errors import ConfigError, DataError
from moekit.data.documents import Document
from moekit.data.loader import IGNORED, Batch, TrainLoader, evaluation_batches
from moekit.data.packing import TokenizedSplit, pack
from moekit.data.tokenizer import train_tokenizer

END = 0
TENSORS = ("token_ids", "targets", "segment_ids", "domain_ids")


def split_of(*documents: tuple[int, list[int]], domains: tuple[str, ...] = ("a", "b")) -> TokenizedSplit:
    """A split from (domain, tokens) by hand; the end marker is put in front of each."""
    rows = [[END, *tokens] for _, tokens in documents]
    return TokenizedSplit(
        tokens=np.array([token for row in rows for token in row], dtype=np.uint16),
        offsets=np.cumsum([0, *map(len, rows)]),
        domain_index=np.array([domain for domain, _ in documents], dtype=np.int32),
        n_bytes=np.array([len(tokens) for _, tokens in documents]),
        domains=domains,
        names=tuple(str(i) for i in range(len(documents))),
        end_id=END,
    )


def counting(n_documents: int, seed: int = 0, domains: int = 2) -> TokenizedSplit:
    """Documents of 3 to 40 tokens in which every token but the end marker is different."""
    rng = np.random.default_rng(seed)
    documents, token = [], 1
    for i in range(n_documents):
        length = int(rng.integers(3, 40))
        documents.append((i % domains, list(range(token, token + length))))
        token += length
    return split_of(*documents, domains=tuple("abcdef"[:domains]))


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in TENSORS)


# --- packing ---------------------------------------------------------------------------------------------


def test_documents_are_laid_out_behind_an_end_marker() -> None:
    documents = [Document("ab", "x", "1"), Document("中", "y", "2"), Document("", "x", "3")]
    tokenizer = train_tokenizer(documents, 257)
    split = pack(documents, tokenizer)
    byte = {text: tokenizer.encode(text) for text in ("ab", "中")}
    assert split.tokens.tolist() == [
        tokenizer.end_id,
        *byte["ab"],
        tokenizer.end_id,
        *byte["中"],
        tokenizer.end_id,
    ]
    assert split.offsets.tolist() == [0, 3, 7, 8]
    assert split.n_bytes.tolist() == [2, 3, 0]
    assert split.domains == ("x", "y")
    assert split.domain_index.tolist() == [0, 1, 0]
    assert split.tokens.dtype == np.uint16
    assert split.domain_sizes()["x"] == {"documents": 2, "tokens": 4, "bytes": 2}
    assert pack(documents, tokenizer, ["y", "x"]).domain_index.tolist() == [1, 0, 1]


def test_a_split_comes_back_from_disk(tmp_path: Path) -> None:
    documents = [*numbered("a", 5), Document("中文", "b", "b/é")]
    tokenizer = train_tokenizer(documents, 300)
    for split in (pack(documents, tokenizer), pack([], tokenizer)):
        split.save(tmp_path / "x" / "split.safetensors")
        loaded = TokenizedSplit.load(tmp_path / "x" / "split.safetensors")
        for name in ("tokens", "offsets", "domain_index", "n_bytes"):
            assert np.array_equal(getattr(split, name), getattr(loaded, name))
            assert getattr(split, name).dtype == getattr(loaded, name).dtype
        assert (loaded.domains, loaded.names, loaded.end_id) == (split.domains, split.names, split.end_id)
    data = (tmp_path / "x" / "split.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) - 3])
    for path in (tmp_path / "cut", tmp_path / "missing"):
        with pytest.raises(DataError, match="is not a tokenized split"):
            TokenizedSplit.load(path)


# --- targets, by hand ------------------------------------------------------------------------------------


def test_targets_by_hand() -> None:
    # one domain and no seed: evaluation keeps the order. The stream is 0 11 12 13 | 0 21 | 0 31 32
    split = split_of((0, [11, 12, 13]), (0, [21]), (0, [31, 32]), domains=("a",))
    (batch,) = evaluation_batches(split, batch_size=2, seq_len=6)
    # rows of max(ceil(9 / 2), 6) tokens, so that no token loses its context
    assert batch.token_ids.tolist()[0] == [0, 11, 12, 13, 0, 21]
    assert batch.targets.tolist() == [[11, 12, 13, 0, 21, 0], [31, 32, 0, IGNORED, IGNORED, IGNORED]]
    assert batch.token_ids.tolist()[1][:3] == [0, 31, 32]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1], [2, 2, 2, -1, -1, -1]]
    assert batch.domain_ids.tolist() == [[0] * 6, [0, 0, 0, -1, -1, -1]]
    assert batch.token_mask.tolist()[1] == [True, True, True, False, False, False]
    assert batch.n_targets == 9
    assert {getattr(batch, name).dtype for name in TENSORS} == {torch.long}


def test_the_last_target_of_a_document_is_the_end_marker_everywhere() -> None:
    split = counting(30)
    after = {}  # token -> what must follow it, from the documents themselves
    for i in range(split.n_documents):
        row = split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist()
        after.update(zip(row[1:], [*row[2:], END], strict=True))
    openings = {int(split.tokens[offset + 1]) for offset in split.offsets[:-1]}
    loader = TrainLoader(split, batch_size=3, seq_len=7, seed=1, order="shuffled")
    for batch in [loader.next_batch() for _ in range(3 * loader.batches_per_epoch)]:
        pairs = zip(batch.token_ids.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)
        for token, target in pairs:
            assert target in openings if token == END else target == after[token]


# --- training order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["streams", "shuffled"])
def test_an_epoch_gives_each_token_at_most_once_and_leaves_out_little(order) -> None:
    split = counting(50)
    loader = TrainLoader(split, batch_size=4, seq_len=8, seed=3, order=order)
    for epoch in range(3):
        seen = []
        while loader.state_dict()["epoch"] == epoch:
            seen += [token for token in loader.next_batch().token_ids.flatten().tolist() if token != END]
        assert len(seen) == len(set(seen))
        assert (
            split.n_tokens - loader.batches_per_epoch * loader.tokens_per_batch < 2 * loader.tokens_per_batch
        )


def test_streams_go_on_from_batch_to_batch() -> None:
    split = counting(60)
    loader = TrainLoader(split, batch_size=4, seq_len=8, seed=0, order="streams")
    batches = [loader.next_batch() for _ in range(loader.batches_per_epoch)]
    for before, after in pairwise(batches):
        assert torch.equal(before.targets[:, -1], after.token_ids[:, 0])
    row = torch.cat([batch.token_ids[2] for batch in batches])
    targets = torch.cat([batch.targets[2] for batch in batches])
    assert torch.equal(row[1:], targets[:-1])
    segments = torch.cat([batch.segment_ids[2] for batch in batches])
    # a new segment begins exactly at an end marker
    assert torch.equal(segments[1:] != segments[:-1], row[1:] == END)


def test_epochs_and_seeds_differ_and_segments_are_never_reused() -> None:
    split = counting(60)
    loader = TrainLoader(split, batch_size=4, seq_len=8, seed=0)
    first = [loader.next_batch() for _ in range(loader.batches_per_epoch)]
    second = loader.next_batch()
    assert not torch.equal(first[0].token_ids, second.token_ids)
    assert not torch.equal(first[0].token_ids, TrainLoader(split, 4, 8, seed=1).next_batch().token_ids)
    assert int(second.segment_ids.min()) >= 60 > int(max(batch.segment_ids.max() for batch in first))


@pytest.mark.parametrize("order", ["streams", "shuffled"])
def test_resuming_anywhere_equals_going_on(order) -> None:
    split = counting(40)
    loader = TrainLoader(split, batch_size=3, seq_len=8, seed=5, order=order)
    states, batches = [], []
    for _ in range(2 * loader.batches_per_epoch + 3):
        states.append(loader.state_dict())
        batches.append(loader.next_batch())
    assert set(states[0]) == {"epoch", "position"}
    assert all(type(value) is int for state in states for value in state.values())
    for start in (0, 1, loader.batches_per_epoch - 1, loader.batches_per_epoch, loader.batches_per_epoch + 2):
        resumed = TrainLoader(split, batch_size=3, seq_len=8, seed=5, order=order)
        resumed.load_state_dict(states[start])
        assert all(equal(resumed.next_batch(), batch) for batch in batches[start:])


def test_a_position_that_does_not_exist_is_refused() -> None:
    loader = TrainLoader(counting(40), batch_size=3, seq_len=8, seed=5)
    for state in ({"epoch": 0, "position": loader.batches_per_epoch}, {"epoch": -1, "position": 0}):
        with pytest.raises(ConfigError, match="Resume with the batch_size and seq_len"):
            loader.load_state_dict(state)


def test_domains_are_interleaved_evenly() -> None:
    rng = np.random.default_rng(0)
    # a domain of a few long documents and one of many short ones, three times as many tokens
    long = [(0, [1] * int(rng.integers(150, 250))) for _ in range(20)]
    short = [(1, [2] * int(rng.integers(20, 40))) for _ in range(400)]
    split = split_of(*long, *short)
    share = (split.lengths[split.domain_index == 0]).sum() / split.n_tokens
    stretch = split.n_tokens // 8
    loader = TrainLoader(split, batch_size=1, seq_len=stretch, seed=1)
    in_training = [loader.next_batch() for _ in range(8)]
    in_evaluation = list(evaluation_batches(split, batch_size=1, seq_len=stretch))[:8]
    for batch in in_training + in_evaluation:
        assert abs(float((batch.domain_ids == 0).float().mean()) - share) < 0.09


def test_too_little_text_for_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match=r"a batch takes 4096 \(train.batch_size 16 x data.seq_len 256\)"):
        TrainLoader(counting(5), batch_size=16, seq_len=256)
    with pytest.raises(ConfigError, match="streams or shuffled"):
        TrainLoader(counting(5), batch_size=1, seq_len=2, order="sorted")  # type: ignore[arg-type]


def test_a_batch_of_16_by_256_costs_less_than_2_ms() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 900, size=600)
    split = split_of(
        *[(i % 3, [1] * int(length)) for i, length in enumerate(lengths)], domains=("a", "b", "c")
    )
    loader = TrainLoader(split, 16, 256)
    loader.next_batch()
    times = []
    for _ in range(30):
        start = time.perf_counter()
        loader.next_batch()
        times.append(time.perf_counter() - start)
    assert sorted(times)[10] < 0.002  # a third of them: other processes may slow the rest


# --- evaluation ------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 40))
def test_evaluation_predicts_each_token_exactly_once(n_documents: int, batch_size: int, seq_len: int) -> None:
    split = counting(n_documents, seed=n_documents)
    for domain in (None, *split.domains[: min(2, n_documents)]):
        found: list[int] = []
        ends = 0
        for batch in evaluation_batches(split, batch_size, seq_len, domain):
            assert batch.token_ids.shape == (batch_size, seq_len)
            counted = batch.targets != IGNORED
            assert torch.equal(counted, batch.token_mask)
            targets = batch.targets[counted].tolist()
            found += [target for target in targets if target != END]
            ends += targets.count(END)
        mine = np.arange(n_documents)
        if domain is not None:
            mine = np.flatnonzero(split.domain_index == split.domain_id(domain))
        expected = [
            t for i in mine for t in split.tokens[split.offsets[i] + 1 : split.offsets[i + 1]].tolist()
        ]
        assert sorted(found) == sorted(expected)
        assert ends == len(mine)


def test_evaluation_rows_go_on_and_only_ends_are_padded() -> None:
    split = counting(60)
    batches = list(evaluation_batches(split, 4, 16))
    assert all(torch.equal(a.targets[:, -1], b.token_ids[:, 0]) for a, b in pairwise(batches[:-1]))
    assert all(bool(batch.token_mask.all()) for batch in batches[:-1])
    assert all(equal(a, b) for a, b in zip(batches, evaluation_batches(split, 4, 16), strict=True))


def test_max_batches_takes_the_first_ones() -> None:
    split = counting(60)
    batches = list(evaluation_batches(split, 4, 16))
    assert all(
        equal(a, b) for a, b in zip(batches[:2], evaluation_batches(split, 4, 16, max_batches=2), strict=True)
    )
    assert len(list(evaluation_batches(split, 4, 16, max_batches=10**6))) == len(batches)


def test_unknown_and_empty_domains() -> None:
    split = counting(6)
    with pytest.raises(DataError, match="no domain 'c' in this split; it has: a, b"):
        next(evaluation_batches(split, 2, 4, domain="c"))
    empty = split_of((0, [1, 2]))
    assert list(evaluation_batches(empty, 2, 4, domain="b")) == []


def test_a_batch_splits_by_rows() -> None:
    batch = TrainLoader(counting(60), 6, 8).next_batch()
    parts = batch.split(3)
    assert [part.token_ids.shape for part in parts] == [(2, 8)] * 3
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert torch.equal(torch.cat([part.segment_ids for part in parts]), batch.segment_ids)
    with pytest.raises(ConfigError, match="must divide the rows"):
        batch.split(4)
