"""`moekit bench model`: a whole OLMoE-shaped model, prefill of a prompt and decoding behind it.

All contestants inside transformers are the same model object, so there is one copy of the weights: "moekit" is what
`moekit.use_in_transformers(model)` makes of it, "moekit experts only" has moekit's experts in transformers'
surroundings, and the others have another implementation of the experts. llama.cpp reads GGUF files written from them.
While decoding, everybody picks the next token greedily and is then given a fixed one, so that all do the same work and
every logit can be compared.

Shape legend: S tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.config.errors import ConfigError, nearest
from moekit.evaluate.bench.checks import Outputs, Tolerance
from moekit.evaluate.bench.compare import (
    DEFAULT_TIMING,
    Case,
    Contestant,
    Role,
    TimingOptions,
    Work,
    run_case,
)
from moekit.evaluate.bench.gguf_file import FORMATS, read_weights, write_gguf
from moekit.evaluate.bench.limits import Gauge, matrix_gauge, read_gauge
from moekit.evaluate.bench.llama import LlamaModel
from moekit.evaluate.bench.olmoe import ModelShape, float32_logits, random_olmoe

# Near ties of a router fall differently after rounding, and such a token has other logits: so most rows must be close,
# and the whole not far. Seen for the default shape: whole 0.009 in bfloat16, 0.013 in Q4_0 against what it stands for
_CLOSE = Tolerance(whole=0.05, row=0.03, share=0.8)
_QUANTISED = Tolerance(
    whole=0.08, row=0.05, share=0.8
)  # llama.cpp rounds activations to 8 bits there as well
_WHOLE = "moekit and what stands around the experts"
# bytes of an element, scales included
_BYTES = {"bf16": 2.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}


def run_model(
    shape: ModelShape,
    *,
    against: Sequence[str] = ("transformers",),
    formats: Sequence[str] = FORMATS,
    use_moekit: Callable[..., object] | None = None,
    undo_moekit: Callable[[Any], object] = lambda model: None,
    folder: Path | None = None,
    threads: int,
    timing: TimingOptions = DEFAULT_TIMING,
    seed: int = 0,
) -> list[Case]:
    """Two cases, prefill and decode.

    Args:
        shape: sizes.
        against: peers; "transformers" brings all of its implementations.
        formats: GGUF types for llama.cpp.
        use_moekit: `moekit.use_in_transformers`; None leaves moekit out.
        undo_moekit: `moekit.convert.transformers.undo`.
        folder: where GGUF files stay, and are found again for the same shape and seed; a temporary one where None.
        threads: threads of llama.cpp.
        timing: how often everybody runs.
        seed: of weights and tokens.
    """
    for kind in formats:
        if kind not in FORMATS:
            raise ConfigError(f"--formats must list GGUF types; got {kind!r}. {nearest(kind, FORMATS)}")
    skipped: dict[str, str] = {}
    implementations: list[tuple[str, str, Role]] = []
    if use_moekit is None:
        skipped["moekit"] = "does not plug into transformers here: run_model was given no use_moekit"
    else:
        use_moekit()
        implementations += [("moekit", _WHOLE, "moekit"), ("moekit experts only", "moekit", "moekit")]
    if "transformers" in against:
        implementations += [
            (f"transformers {each}", each, "peer") for each in ("grouped_mm", "batched_mm", "eager")
        ]
    model = random_olmoe(shape, seed)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocab_size, (shape.context,), generator=random)
    logits = cache(lambda: float32_logits(model, ids))
    players: list[_Player] = [
        _Transformers(name, role, logits, _CLOSE, 2.0, model, implementation, use_moekit, undo_moekit)
        for name, implementation, role in implementations
    ]
    with contextlib.ExitStack() as stack:
        if "llama-cpp" in against:
            where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moekit-bench-")))
            where.mkdir(parents=True, exist_ok=True)
            for kind in formats:
                path = where / f"olmoe-{'-'.join(map(str, asdict(shape).values()))}-seed{seed}-{kind}.gguf"
                if not path.exists():
                    write_gguf(model, shape, path, kind)
                expected = logits if kind == "bf16" else cache(partial(_from_file, model, ids, path))
                llama = LlamaModel(path, shape.vocab_size, shape.context, shape.prompt, threads)
                stack.callback(llama.close)
                tolerance = _CLOSE if kind == "bf16" else _QUANTISED
                players.append(_Llama(f"llama-cpp {kind}", "peer", expected, tolerance, _BYTES[kind], llama))
        too_much = {
            "transformers batched_mm": "copies the matrices of every choice of every token: decode only"
        }
        decode_only = too_much if "transformers" in against else {}
        first = [each.prefill(shape, ids) for each in players if each.name not in decode_only]
        second = [each.decode(shape, ids) for each in players]
        prefill_gauges = {"flops": matrix_gauge(torch.bfloat16)}
        decode_gauges: dict[str, Gauge] = {"bytes": read_gauge()}
        return [
            run_case("prefill", asdict(shape), first, {**skipped, **decode_only}, prefill_gauges, timing),
            run_case("decode", asdict(shape), second, skipped, decode_gauges, timing),
        ]


def _from_file(model: Any, ids: Tensor, path: Path) -> Tensor:
    return float32_logits(model, ids, read_weights(path))


@dataclass
class _Player:
    """Somebody with a model and a key/value cache; `logits()` are the right ones `[S, V]` of prompt and new tokens."""

    name: str
    role: Role
    logits: Callable[[], Tensor]
    tolerance: Tolerance
    bytes_per_element: float

    def reset(self, length: int) -> None:
        """Keep `length` tokens of the cache; called before every run, not timed."""
        raise NotImplementedError

    def begin(self, ids: Tensor) -> None:
        """A cache that holds `ids [S]`, made in any way."""
        self.reset(0)
        self.fill(ids)

    def fill(self, ids: Tensor) -> None:
        """Append `ids [S]` at once, as a reader who wants the logits of the last one."""
        raise NotImplementedError

    def fill_logits(self, ids: Tensor) -> Tensor:
        """The same with all logits, `[S, V]`."""
        raise NotImplementedError

    def extend(self, ids: Tensor) -> None:
        """Append `ids [S]` one by one, finding the most probable token after each."""
        raise NotImplementedError

    def extend_logits(self, ids: Tensor) -> Tensor:
        """The same, giving the logits `[S, V]`."""
        raise NotImplementedError

    def prefill(self, shape: ModelShape, ids: Tensor) -> Contestant:
        """The prompt into an empty cache."""
        prompt = ids[: shape.prompt]

        def run() -> Outputs:
            self.fill(prompt)
            return {}  # what is checked is run apart from this: copying logits is no part of the work

        return Contestant(
            self.name,
            run=run,
            expected=lambda: {"logits": self.logits()[: shape.prompt]},
            tolerance={"logits": self.tolerance},
            work=Work(flops=shape.prefill_flops, tokens=shape.prompt),
            role=self.role,
            prepare=lambda: self.reset(0),
            checked=lambda: {"logits": self.fill_logits(prompt)},
        )

    def decode(self, shape: ModelShape, ids: Tensor) -> Contestant:
        """New tokens behind the prompt, one by one."""
        prompt, new = ids[: shape.prompt], ids[shape.prompt :]
        filled = False

        def prepare() -> None:
            nonlocal filled
            if not filled:
                self.begin(prompt)
                filled = True
            self.reset(shape.prompt)

        def run() -> Outputs:
            self.extend(new)
            return {}

        per_token = shape.layers * shape.layer_matrix + shape.head_matrix
        return Contestant(
            self.name,
            run=run,
            expected=lambda: {"logits": self.logits()[shape.prompt :]},
            tolerance={"logits": self.tolerance},
            work=Work(
                flops=2.0 * per_token * shape.new_tokens,
                bytes=self.bytes_per_element * per_token * shape.new_tokens,
                tokens=shape.new_tokens,
            ),
            role=self.role,
            prepare=prepare,
            checked=lambda: {"logits": self.extend_logits(new)},
        )


@dataclass
class _Transformers(_Player):
    model: Any
    implementation: str
    use_moekit: Callable[..., object] | None
    undo_moekit: Callable[[Any], object]
    cache: Any = None

    def reset(self, length: int) -> None:
        self.undo_moekit(self.model)
        if self.implementation == _WHOLE and self.use_moekit is not None:
            self.use_moekit(self.model)
        else:
            self.model.set_experts_implementation(self.implementation)
        if length == 0 or self.cache is None:
            from transformers import DynamicCache

            self.cache = DynamicCache()
        elif (extra := self.cache.get_seq_length() - length) > 0:
            self.cache.crop(-extra)

    def begin(self, ids: Tensor) -> None:
        self.reset(0)
        # batched_mm would copy the matrices of every choice of every token
        self.model.set_experts_implementation("eager")
        self._forward(ids, 1)

    def fill(self, ids: Tensor) -> None:
        self._forward(ids, 1)

    def fill_logits(self, ids: Tensor) -> Tensor:
        return self._forward(ids, 0)  # 0 keeps all

    def extend(self, ids: Tensor) -> None:
        for token in ids.split(1):
            int(self._forward(token, 1).argmax())

    def extend_logits(self, ids: Tensor) -> Tensor:
        return torch.cat([self._forward(token, 1) for token in ids.split(1)])

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        with torch.no_grad():
            out = self.model(
                input_ids=ids[None], past_key_values=self.cache, use_cache=True, logits_to_keep=keep
            )
        logits: Tensor = out.logits[0]
        return logits


@dataclass
class _Llama(_Player):
    model: LlamaModel

    def reset(self, length: int) -> None:
        self.model.rewind(length)

    def fill(self, ids: Tensor) -> None:
        self.model.prefill(ids.tolist())

    def fill_logits(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.model.prefill_logits(ids.tolist()))

    def extend(self, ids: Tensor) -> None:
        self.model.decode(ids.tolist())

    def extend_logits(self, ids: Tensor) -> Tensor:
        self.model.decode(ids.tolist())
        return torch.from_numpy(self.model.logits())
