"""Columns of texts that are generated: token ids for a decoder, and its answers back to text.

An answer ends with id 0, which also stands before it when a decoder begins: 0 is the padding of inputs, and answers
need none, because what does not count is -100 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.task import AnyInput, AnyTarget, SequenceHeadConfig, SequenceTarget, TextInput
from moekit.data.encoding.base import Encoded, Encoder, Ragged, require_value
from moekit.data.encoding.targets import IGNORED, TargetEncoder
from moekit.data.encoding.text import UNKNOWN, TextEncoder
from moekit.data.examples import Examples

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Tokenizer

END = 0


class SequenceEncoder(TargetEncoder):
    """Texts as token ids with an end behind them; an answer that is None is unknown and counts nowhere.

    >>> train = Examples({"target": ["uno dos", "dos tres"]})
    >>> encoder = SequenceEncoder.fit(SequenceTarget(), train)
    >>> encoder.text([*encoder.ids(["tres dos"])[0], 5, 6])    # what stands behind the end is not read
    'tres dos'
    """

    kind = "sequence"

    def __init__(self, config: SequenceTarget, tokenizer: _Tokenizer, longest: int) -> None:
        from tokenizers import Tokenizer as _Tokenizer
        from tokenizers import decoders

        self.config, self.longest = config, longest
        self._state = tokenizer.to_str()
        # one of its own: inputs that share it have no use for a decoder
        self.tokenizer = _Tokenizer.from_str(self._state)
        self._is_bpe = '"ByteLevel"' in self._state
        self._is_split = '"Split"' in self._state
        if self._is_bpe:
            self.tokenizer.decoder = decoders.ByteLevel()

    @classmethod
    def fit(cls, config: SequenceTarget, train: Examples) -> SequenceEncoder:
        own = TextInput(column=config.column, tokenizer=config.tokenizer, vocab_size=config.vocab_size)
        known = [text for text in train[config.column] if text is not None]
        return cls._measured(config, TextEncoder.fit(own, Examples({config.column: known})), train)

    @classmethod
    def fit_with(
        cls, config: SequenceTarget, train: Examples, inputs: Mapping[str, Encoder]
    ) -> SequenceEncoder:
        """With the tokenizer of the input that it shares, see `with_shared`."""
        if config.share is None:
            return cls.fit(config, train)
        shared = inputs[config.share]
        assert isinstance(shared, TextEncoder)
        return cls._measured(config, shared, train)

    @classmethod
    def _measured(cls, config: SequenceTarget, text: TextEncoder, train: Examples) -> SequenceEncoder:
        found = cls(config, text.tokenizer, config.max_len)
        sizes = [len(ids) for ids in found.ids(train[config.column])]
        return cls(config, text.tokenizer, max(1, *sizes) if sizes else config.max_len)

    def part(self) -> StrictConfig:
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        return SequenceHeadConfig(
            vocab_size=self.tokenizer.get_vocab_size(), layers=self.config.layers, share=self.config.share,
            tied=self.config.tied, never=() if unknown is None else (unknown,), max_len=self.longest,
            smoothing=self.config.smoothing, beams=self.config.beams,
            length_penalty=self.config.length_penalty, weight=self.config.weight,
        )  # fmt: skip

    def ids(self, texts: Any) -> list[np.ndarray]:
        """Token ids of each text, the end behind them where they are not cut off; nothing for None.

        Errors: `DataError` naming the example where there is something else than text.
        """
        known = [place for place, text in enumerate(texts) if text is not None]
        for place in known:
            require_value(
                isinstance(texts[place], str), self.config.column, place, texts[place], "must hold text"
            )
        found = [np.zeros(0, dtype=np.int64) for _ in texts]
        encodings = self.tokenizer.encode_batch([texts[place] for place in known], add_special_tokens=False)
        for place, one in zip(known, encodings, strict=True):
            found[place] = np.asarray([*one.ids, END][: self.config.max_len], dtype=np.int64)
        return found

    def encode(self, examples: Examples) -> Encoded:
        empty = np.full(1, IGNORED, dtype=np.int64)
        return Ragged(
            IGNORED, targets=[ids if len(ids) else empty for ids in self.ids(examples[self.config.column])]
        )

    def text(self, ids: Any) -> str:
        """The text of token ids up to the first end."""
        kept: list[int] = []
        for number in ids:
            if int(number) == END:
                break
            kept.append(int(number))
        if self._is_bpe:
            return self.tokenizer.decode(kept, skip_special_tokens=False).strip()
        words = [self.tokenizer.id_to_token(number) or UNKNOWN for number in kept]
        return ("" if self._is_split else " ").join(words).strip()

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        """The text, and the mean probability of its tokens: exp of the mean of their logarithms."""
        ids = answer[row, :, 0].long().tolist()
        n = ids.index(END) + 1 if END in ids else len(ids)
        sure = float(answer[row, :n, 1].double().mean().exp())
        return {"prediction": self.text(ids), "probability": sure, "tokens": n}

    def truth(self, examples: Examples) -> list[Any]:
        return list(examples[self.config.column])

    def state(self) -> dict[str, Any]:
        return {"tokenizer": self._state, "longest": self.longest}

    @classmethod
    def from_state(cls, config: SequenceTarget, state: Mapping[str, Any]) -> SequenceEncoder:
        from tokenizers import Tokenizer as _Tokenizer

        return cls(config, _Tokenizer.from_str(state["tokenizer"]), state["longest"])


def with_shared(name: str, config: AnyInput, targets: Mapping[str, AnyTarget], train: Examples) -> Examples:
    """What the input `name` is fitted on: the training examples, or its texts and those of targets that share it."""
    columns = [
        target.column
        for target in targets.values()
        if isinstance(target, SequenceTarget) and target.share == name
    ]
    if not columns or not isinstance(config, TextInput):
        return train
    answers = [text for column in columns for text in train[column] if text is not None]
    return Examples({config.column: [*train[config.column], *answers]})
