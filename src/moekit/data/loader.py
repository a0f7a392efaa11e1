"""Batches from a tokenized split: endless and resumable for training, each token once for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moekit.config.errors import ConfigError, DataError, nearest, require
from moekit.data.packing import TokenizedSplit

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows of token ids with what to predict; all `[B, S]` long.

    Attributes: token_ids: what the model reads. targets: the next token of the same document, its end marker
        at the end; -100 where nothing is to be predicted. segment_ids: a number per document, ascending along
        a row; -1 in padding. Attention must not cross them. domain_ids: domain of each token (position in the
        split's `domains`); -1 in padding.
    """

    token_ids: Tensor
    targets: Tensor
    segment_ids: Tensor
    domain_ids: Tensor

    def split(self, n: int) -> list[Batch]:
        """`n` batches of equally many rows each, in order.

        Raises:
            ConfigError: if the rows do not divide by `n`.
        """
        rows = self.token_ids.shape[0]
        require(
            n >= 1 and rows % n == 0, "train.accumulation", n, f"must divide the rows of a batch ({rows})"
        )
        parts = zip(*(getattr(self, item.name).chunk(n) for item in fields(self)), strict=True)
        return [Batch(*part) for part in parts]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        return Batch(*(getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)))

    def arguments(self) -> dict[str, Tensor]:
        """What a language model is called with."""
        return {"token_ids": self.token_ids, "targets": self.targets, "segment_ids": self.segment_ids}

    @property
    def n_tokens(self) -> int:
        """Tokens, padding counted."""
        return self.token_ids.numel()

    @property
    def token_mask(self) -> Tensor:
        """`[B, S]` bool: False in padding."""
        return self.segment_ids >= 0

    @property
    def n_targets(self) -> int:
        """How many tokens are to be predicted."""
        return int((self.targets != IGNORED).sum())


def interleaved_order(split: TokenizedSplit, rng: np.random.Generator | None = None) -> np.ndarray:
    """Positions of all documents in an order in which every stretch has about the whole's mix of domains.

    Documents are shuffled within their domain (or left in place without `rng`). Each is then put where its
    middle lies in its domain's own tokens, as a share, and all domains are merged by that share.
    """
    place = np.empty(split.n_documents, dtype=np.float64)
    for domain in range(len(split.domains)):
        mine = np.flatnonzero(split.domain_index == domain)
        if len(mine) == 0:
            continue
        if rng is not None:
            mine = rng.permutation(mine)
        lengths = split.lengths[mine]
        ends = np.cumsum(lengths)
        place[mine] = (ends - lengths / 2) / ends[-1]
    return np.lexsort((np.arange(split.n_documents), place))


@dataclass(frozen=True)
class _Stream:
    """Documents of a split in some order as flat arrays `[N]`; segments count from `first_segment`."""

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    domains: np.ndarray
    first_segment: int


def _stream(split: TokenizedSplit, order: np.ndarray, first_segment: int = 0) -> _Stream:
    lengths = split.lengths[order]
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    # index of each token in the split: its document's offset, plus its place within the document
    index = np.repeat(split.offsets[:-1][order] - starts, lengths) + np.arange(int(lengths.sum()))
    tokens = split.tokens[index]
    # every document opens with the end marker, so the next token of the stream is the right target everywhere
    targets = np.append(tokens[1:], np.asarray([split.end_id], dtype=tokens.dtype))
    segments = np.repeat(np.arange(len(order), dtype=np.int32), lengths)
    domains = np.repeat(split.domain_index[order].astype(np.int16), lengths)
    return _Stream(tokens, targets, segments, domains, first_segment)


def _batch(stream: _Stream, index: np.ndarray) -> Batch:
    """The batch at flat positions `index [B, S]`; -1 is padding."""
    tokens, targets, segments, domains = (
        values[index].astype(np.int64)
        for values in (stream.tokens, stream.targets, stream.segments, stream.domains)
    )
    segments += stream.first_segment
    padding = index < 0
    if padding.any():
        # a stream opens with the end marker: a harmless token to pad with
        tokens[padding] = stream.tokens[0]
        targets[padding], segments[padding], domains[padding] = IGNORED, -1, -1
    return Batch(*map(torch.from_numpy, (tokens, targets, segments, domains)))


class TrainLoader:
    """Endless batches in a fixed order whose position is two integers.

    Every epoch shuffles the documents by (seed, epoch), interleaves the domains evenly and joins all into one
    stream. "streams" cuts it into `batch_size` long rows and walks along them: row b of a batch goes on where
    row b of the last one ended, so that a recurrent model may carry its memory. "shuffled" cuts it into
    sequences and draws them in random order. What does not fill a batch at the end of an epoch is left out,
    other tokens each time.

    Args:
        split: what to train on.
        batch_size, seq_len: B and S; the position is only valid for the same values (and seed and order).
        seed: of the order.
        order: "streams" or "shuffled".
        domains: train on these alone; on all of the split where None.

    Raises:
        DataError: if the split is too small for a single batch.
        ConfigError: for a domain that the split has not, with the nearest name.

    Example:
        loader = TrainLoader(data.train, batch_size=16, seq_len=256, seed=0)
        batch = loader.next_batch()
        loader.load_state_dict({"epoch": 0, "position": 0})   # gives the same batch again
    """

    def __init__(
        self,
        split: TokenizedSplit,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        order: Literal["streams", "shuffled"] = "streams",
        domains: Sequence[str] | None = None,
    ):
        require(order in ("streams", "shuffled"), "data.order", order, "must be streams or shuffled")
        require(batch_size >= 1, "train.batch_size", batch_size, "must be at least 1")
        require(seq_len >= 1, "data.seq_len", seq_len, "must be at least 1")
        for domain in domains or ():
            require(domain in split.domains, "data.domains", domain, "must name domains of the text",
                    nearest(domain, split.domains))  # fmt: skip
        self.split = split = split.only(domains)
        self.domains = None if domains is None else sorted(domains)
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.order = order
        self.batches_per_epoch = split.n_tokens // batch_size // seq_len
        if order == "shuffled":
            self.batches_per_epoch = split.n_tokens // seq_len // batch_size
        if self.batches_per_epoch == 0:
            raise DataError(
                f"the training split has {split.n_tokens} tokens, a batch takes {self.tokens_per_batch} "
                f"(train.batch_size {batch_size} x data.seq_len {seq_len}). "
                "Give more text or lower one of the two"
            )
        self._epoch = 0
        self._position = 0
        self._loaded_epoch = -1

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * self.seq_len

    def layout(self) -> dict[str, Any]:
        """What a position is bound to, by configuration key."""
        return {
            "train.batch_size": self.batch_size,
            "data.seq_len": self.seq_len,
            "data.order": self.order,
            "data.domains": self.domains,
            "train.seed": self.seed,
        }

    def next_batch(self) -> Batch:
        """The next batch; moves the position on."""
        if self._loaded_epoch != self._epoch:
            self._load_epoch()
        batch = _batch(self._current, self._starts[self._position][:, None] + self._steps[None, :])
        self._position += 1
        if self._position == self.batches_per_epoch:
            self._epoch, self._position = self._epoch + 1, 0
        return batch

    def _load_epoch(self) -> None:
        rng = np.random.Generator(np.random.PCG64([self.seed, self._epoch]))
        order = interleaved_order(self.split, rng)
        # numbers that no earlier epoch used: a document that ends one epoch and opens the next is still two
        # segments
        self._current = _stream(self.split, order, first_segment=self._epoch * self.split.n_documents)
        n_batches, rows = self.batches_per_epoch, self.batch_size
        if self.order == "streams":
            row_length = self.split.n_tokens // rows
            first = np.arange(rows) * row_length
            self._starts = first[None, :] + np.arange(n_batches)[:, None] * self.seq_len
        else:
            # sequences begin at a random phase, so that what is left out differs even for a single document
            spare = self.split.n_tokens - n_batches * rows * self.seq_len
            phase = int(rng.integers(0, spare + 1))
            drawn = rng.permutation(n_batches * rows)
            self._starts = (phase + drawn * self.seq_len).reshape(n_batches, rows)
        self._steps = np.arange(self.seq_len)
        self._loaded_epoch = self._epoch

    def state_dict(self) -> dict[str, int]:
        """The position: batches taken in the current epoch, and the epoch."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position that `state_dict` gave; the next batch is the one that would have come then.

        Raises:
            ConfigError: if the position does not exist with this batch size and length.
        """
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < self.batches_per_epoch:
            raise ConfigError(
                f"data position must lie in {self.batches_per_epoch} batches; got {state!r}. "
                "Resume with the batch_size and seq_len of the run"
            )
        self._epoch, self._position = epoch, position


def evaluation_batches(
    split: TokenizedSplit,
    batch_size: int,
    seq_len: int,
    domain: str | None = None,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Batches that predict each token of the split, or of one domain, exactly once.

    The documents, domains interleaved, form one stream that is cut into `batch_size` rows; row b of a batch
    goes on where row b of the last one ended. Rows end in padding where the stream does. `max_batches` takes
    the first ones, which sample the split evenly, since each row lies elsewhere in it.

    Raises:
        DataError: if the split has no such domain.
    """
    require(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
    order = interleaved_order(split)
    if domain is not None:
        order = order[split.domain_index[order] == split.domain_id(domain)]
    stream = _stream(split, order)
    n_tokens = len(stream.tokens)
    if n_tokens == 0:
        return
    # rows shorter than a sequence would only take context away from their tokens
    row_length = max(-(-n_tokens // batch_size), min(seq_len, n_tokens))
    n_batches = -(-row_length // seq_len)
    if max_batches is not None:
        n_batches = min(n_batches, max_batches)
    first = np.arange(batch_size)[:, None] * row_length
    for number in range(n_batches):
        step = number * seq_len + np.arange(seq_len)[None, :]
        index = first + step
        yield _batch(stream, np.where((step < row_length) & (index < n_tokens), index, -1))
