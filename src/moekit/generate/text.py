"""Continue prompts with a decoder (key/value cache) or with Transformer-XL (memory)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moekit.config.errors import ConfigError, require
from moekit.config.model import ModelConfig, TransformerXLConfig
from moekit.generate.sampling import Sampler
from moekit.generate.trace import RoutingTrace
from moekit.layers.cache import KVCache
from moekit.layers.elastic import Elastic
from moekit.layers.plan import RoutingPlan
from moekit.models.elastic import require_elastic_model


class TextCodec(Protocol):
    """What generation needs of a tokenizer; `moekit.data.tokenizer.Tokenizer` has it."""

    end_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    Attributes:
        text: the new text, without the prompt.
        token_ids: the new tokens, without the end marker that stopped them.
        tokens_per_second: new tokens over the seconds from reading the prompt to the last token; prompts that
            ran in one batch share these seconds, so the rate of the batch is the sum of theirs.
        stopped: whether the model ended the text by itself.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens_per_second: float
    stopped: bool = False


def generate(
    model: nn.Module,
    tokenizer: TextCodec,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_at_end: bool = True,
    on_token: Callable[[int, str], None] | None = None,
    trace: RoutingTrace | None = None,
    elastic: Elastic | None = None,
    pace: Pace | None = None,
) -> list[Generation]:
    """Continue each prompt by at most `max_new_tokens` tokens; answers are in the order of the prompts.

    Args:
        model: a decoder or a Transformer-XL; used in evaluation mode and given back in the mode it came in.
        tokenizer: that the model was trained with. A prompt begins a document: the end marker stands before
            it, as in training, so an empty prompt is allowed.
        prompts: one text or several, or token ids, which are taken as they are, without an end marker before them.
            Prompts with equally many tokens run in one batch, others one batch after another: no padding, so a
            prompt gets the same tokens whatever its neighbours are (unless experts have a capacity, which
            tokens of one batch share).
        max_new_tokens: upper bound, at least 1.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampler`; temperature 0 is greedy.
        seed: prompt number i draws from a generator of (seed, i).
        stop_at_end: end a text at the end marker; False writes on through it.
        on_token: called with the number of the prompt and the text that a new token completed. Bytes of an
            unfinished character wait for the token that finishes it, so pieces are whole characters and
            together they are the text.
        trace: takes the routing of every token that is read or written; the last one is read for it alone.
        elastic: experts per token, and which may be chosen, of a sparse decoder; None for what it was configured with.
        pace: chooses this anew before every token from the seconds that the last one took, such as
            `moekit.serve.controller.LatencyController`; in place of `elastic`.

    Long texts: a decoder sees at most `max_seq_len` tokens, because rotary positions beyond those it was
    trained on mean nothing to it. When they are full it reads the latest half again and goes on from there.
    Transformer-XL reads a prompt segment by segment; its memory is `eval_memory_length`, but here at least
    `max_seq_len`, since a token in the middle of a training segment saw as much.

    Returns one `Generation` per prompt. Errors: `ConfigError` for bad values, `NonFiniteError` where the
    model answers NaN.
    """
    sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty)
    require(isinstance(max_new_tokens, int) and max_new_tokens >= 1, "max_new_tokens", max_new_tokens,
            "must be an integer of at least 1")  # fmt: skip
    require(isinstance(seed, int) and seed >= 0, "seed", seed, "must be an integer of at least 0")
    require(elastic is None or pace is None, "elastic", elastic, "must be None with pace, which chooses it")
    require_elastic_model(model, elastic if pace is None else pace.setting)
    given: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
    sequences = [
        _Sequence(number, _ids_of(prompt, tokenizer), seed, tokenizer, on_token)
        for number, prompt in enumerate(given)
    ]
    by_length: dict[int, list[_Sequence]] = defaultdict(list)
    for sequence in sequences:
        by_length[len(sequence.ids)].append(sequence)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for group in by_length.values():
                end_id = tokenizer.end_id if stop_at_end else None
                _continue(model, group, sampler, max_new_tokens, end_id, trace, elastic, pace)
    finally:
        model.train(was_training)
    return [sequence.result() for sequence in sequences]


def _continue(
    model: nn.Module,
    group: list[_Sequence],
    sampler: Sampler,
    max_new_tokens: int,
    end_id: int | None,
    trace: RoutingTrace | None,
    elastic: Elastic | None,
    pace: Pace | None,
) -> None:
    """Grow sequences of equal length together until each has ended."""
    start = time.perf_counter()
    reader = make_reader(model, len(group), len(group[0].ids) + max_new_tokens)

    def read(n: int, step: int) -> Tensor:
        """The last `n` tokens of each."""
        token_ids = torch.tensor([sequence.ids[-n:] for sequence in group])
        reader.elastic = elastic if pace is None else pace.setting
        answer = reader.read(token_ids)
        if trace is not None:
            trace.add(reader.routing, token_ids, [s.number for s in group], len(group[0].ids) - n, step)
        return answer

    logits = read(len(group[0].ids), 0)  # takes as long as a prompt is long: only single tokens have a pace
    for step in range(max_new_tokens):
        history = [sequence.ids for sequence in group]
        chosen = sampler(logits, history, [sequence.generator for sequence in group]).tolist()
        going = []
        for row, (sequence, token) in enumerate(zip(group, chosen, strict=True)):
            sequence.stopped = token == end_id
            if not sequence.stopped:
                sequence.append(token)
                going.append(row)
            sequence.seconds = time.perf_counter() - start
        if not going or (step == max_new_tokens - 1 and trace is None):
            break
        if len(going) < len(group):
            group = [group[row] for row in going]
            reader.keep_rows(torch.tensor(going))
        began = time.perf_counter()
        logits = read(1, step + 1)
        if pace is not None:
            pace.after_step(time.perf_counter() - began)


def _ids_of(prompt: str | Sequence[int], tokenizer: TextCodec) -> list[int]:
    if isinstance(prompt, str):
        return [tokenizer.end_id, *tokenizer.encode(prompt)]
    require(len(prompt) > 0, "prompts", list(prompt), "must hold at least one token id each")
    return list(prompt)


@dataclass
class _Sequence:
    """One prompt and what has been added to it."""

    number: int
    ids: list[int]
    seed: int
    tokenizer: TextCodec
    on_token: Callable[[int, str], None] | None
    stopped: bool = False
    seconds: float = 0.0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.ids)
        # the golden ratio keeps neighbouring (seed, number) pairs apart; torch mixes the bits of a seed
        # further
        self.generator = torch.Generator().manual_seed((self.seed + self.number * 0x9E3779B97F4A7C15) % 2**63)
        self.stream = TextStream(self.tokenizer)

    def append(self, token: int) -> None:
        self.ids.append(token)
        piece = self.stream.push(token)
        if self.on_token is not None and piece:
            self.on_token(self.number, piece)

    def result(self) -> Generation:
        rest = self.stream.finish()
        if self.on_token is not None and rest:
            self.on_token(self.number, rest)
        new = tuple(self.ids[self.n_prompt :])
        rate = len(new) / self.seconds if self.seconds > 0 else 0.0
        return Generation(self.tokenizer.decode(new), new, rate, self.stopped)


class TextStream:
    """Text of tokens as they come, in whole characters.

    A byte-level token may end inside a character, and a Chinese one is often three tokens long in an unusual
    text. Decoding such a part gives U+FFFD at its end, which is held back until it becomes a character, or
    until `finish`, where it is what the text really ends with.

    >>> from moekit.data.documents import Document
    >>> from moekit.data.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer([Document("a", "english", "a")], vocab_size=257)     # one token per byte
    >>> stream = TextStream(tokenizer)
    >>> [stream.push(token) for token in tokenizer.encode("a中!")]
    ['a', '', '', '中', '!']
    """

    def __init__(self, tokenizer: TextCodec) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that `token` completed; may be empty."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        complete = not text.endswith("\ufffd")
        end = len(text) if complete else len(text) - 1
        piece = text[self._shown : end]
        self._shown += len(piece)
        if complete:
            self._pending, self._shown = [], 0
        return piece

    def finish(self) -> str:
        """What was held back."""
        piece = self._tokenizer.decode(self._pending)[self._shown :] if self._pending else ""
        self._pending, self._shown = [], 0
        return piece


class Pace(Protocol):
    """Chooses the routing of each step from how long the steps before took."""

    @property
    def setting(self) -> Elastic:
        """For the next step."""
        ...

    def after_step(self, seconds: float) -> object:
        """Take note of the step that was made at `setting`."""
        ...


class Reader(Protocol):
    """Reads tokens of a batch one part after another and keeps what the model must remember of them.

    Attributes:
        elastic: the routing of the reads to come; None for what the model was configured with.
        routing: the plans of each pass of the last `read`; a pass may have begun with earlier tokens again.
    """

    elastic: Elastic | None
    routing: list[tuple[RoutingPlan, ...]]

    def read(self, token_ids: Tensor) -> Tensor:
        """Take in `[B, n]` further tokens; logits `[B, V]` of the token after them."""
        ...

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        ...


def make_reader(model: nn.Module, batch: int, max_tokens: int) -> Reader:
    """The reader for the kind of `model`, for `batch` rows of at most `max_tokens` tokens."""
    config = getattr(model, "config", None)
    if isinstance(config, TransformerXLConfig):
        return RecurrentReader(model)
    if isinstance(config, ModelConfig):
        sparse: Any = getattr(model, "moe_layers", ())
        if any(layer.router.reads_history for layer in sparse):
            return RereadingReader(model, batch)
        return CachedReader(model, batch, max_tokens)
    raise ConfigError(
        f"model.config must be a ModelConfig or a TransformerXLConfig; got {type(config).__name__}. "
        "Build the model with moekit.build_model"
    )


class CachedReader:
    """A decoder with a key/value cache of at most `max_seq_len` tokens.

    Where further tokens no longer fit, the cache is emptied and filled from the latest `max_seq_len // 2`
    tokens (more, where more come in at once). Their keys could not stay: they were computed from, and rotated
    for, a text that begins earlier.
    """

    def __init__(self, model: nn.Module, batch: int, max_tokens: int) -> None:
        self.model: Any = model
        config: Any = model.config
        self.window: int = config.max_seq_len
        parameter = next(model.parameters())
        self.device = parameter.device
        kind = parameter.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
        room = min(self.window, max_tokens)
        self.cache = KVCache.for_config(config, batch, room, dtype, self.device)
        self.recent = torch.empty(batch, 0, dtype=torch.long)
        self.routing: list[tuple[RoutingPlan, ...]] = []
        self.elastic: Elastic | None = None

    def read(self, token_ids: Tensor) -> Tensor:
        self.recent = torch.cat([self.recent, token_ids], dim=1)[:, -self.window :]
        if self.cache.length + token_ids.shape[1] > self.window:
            new = min(token_ids.shape[1], self.window)
            token_ids = self.recent = self.recent[:, -max(new, self.window // 2) :]
            self.cache.clear()
        out = self.model(
            token_ids.to(self.device), cache=self.cache, return_logits=False, elastic=self.elastic
        )
        self.routing = [out.routing]
        return self.model.head.logits(out.hidden_states[:, -1])

    def keep_rows(self, rows: Tensor) -> None:
        self.cache.keep_rows(rows)
        self.recent = self.recent[rows]


class RereadingReader:
    """A decoder without a cache, for routers that read earlier tokens: each step computes the text again.

    It sees what `CachedReader` would: at most `max_seq_len` tokens, and the latest half of them, or what came
    in last, where they are full.
    """

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.model: Any = model
        config: Any = model.config
        self.window: int = config.max_seq_len
        self.device = next(model.parameters()).device
        self.text = torch.empty(batch, 0, dtype=torch.long)
        self.routing: list[tuple[RoutingPlan, ...]] = []
        self.elastic: Elastic | None = None

    def read(self, token_ids: Tensor) -> Tensor:
        self.text = torch.cat([self.text, token_ids], dim=1)
        if self.text.shape[1] > self.window:
            new = min(token_ids.shape[1], self.window)
            self.text = self.text[:, -max(new, self.window // 2) :]
        out = self.model(self.text.to(self.device), return_logits=False, elastic=self.elastic)
        self.routing = [out.routing]
        return self.model.head.logits(out.hidden_states[:, -1])

    def keep_rows(self, rows: Tensor) -> None:
        self.text = self.text[rows]


class RecurrentReader:
    """A Transformer-XL with its memory; long inputs go segment by segment."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.memory: dict[str, Tensor] | None = None
        self.routing: list[tuple[RoutingPlan, ...]] = []
        self.elastic: Elastic | None = None  # its layers are dense

    def read(self, token_ids: Tensor) -> Tensor:
        segment = self.model.config.max_seq_len
        length = max(self.model.memory_length, segment)
        self.routing = []
        for part in token_ids.to(self.device).split(segment, dim=1):
            out = self.model(part, memory=self.memory, memory_length=length, return_logits=False)
            self.memory = out.memory
            self.routing.append(out.routing)
        return self.model.head.logits(out.hidden_states[:, -1])

    def keep_rows(self, rows: Tensor) -> None:
        if self.memory is not None:
            self.memory = {name: tensor[rows.to(tensor.device)] for name, tensor in self.memory.items()}
