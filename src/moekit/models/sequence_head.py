"""A decoder behind the backbone: translation, replies (Vaswani et al. 2017, arXiv 1706.03762).

    tokens before ─► table ─► layers of self-attention, cross-attention to the backbone's vectors, feed-forward
                                                              │
    training: the states at all places, and their loss ◄──────┴──────► generation: one token after the other

Shape legend: B examples, T tokens of an answer, D width, V token ids. Id 0 begins and ends an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.backbone import BackboneConfig
from moekit.config.errors import ConfigError
from moekit.config.task import SequenceHeadConfig, TaskModelConfig
from moekit.kernels.cross_entropy import linear_cross_entropy
from moekit.layers.cache import KVCache
from moekit.layers.cross_attention import Memory
from moekit.layers.elastic import Elastic
from moekit.layers.moe import MoE
from moekit.models.backbone import Backbone, BackboneOutput
from moekit.models.beam_search import search
from moekit.models.task_heads import IGNORED, Head, HeadOutput, Hidden, register_head

END = 0


@register_head("sequence")
class SequenceHead(Head):
    """Texts; targets `[B, T]` token ids, the end behind each, -100 where nothing counts.

    With targets the answer is `[B, T, D]`, the states that predict them; without, `[B, T, 2]`: the ids of what was
    generated (0 behind the end) and their log-probabilities.
    """

    reads_pooled = False

    def __init__(self, config: SequenceHeadConfig, model: TaskModelConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Backbone(decoder_config(model, config.layers), may_look_ahead=True, cross=True)
        for layer in self.decoder.moe_layers:
            if not layer.causal:
                raise ConfigError(
                    f"a head of kind sequence predicts later tokens, but router {layer.router.name!r} or "
                    "moe.drop_policy 'probability' looks at them. Choose another one"
                )
        self.decoder.reset_parameters()
        self.table = _table(config.vocab_size, model.d_model)
        self.output = self.table if config.tied else _table(config.vocab_size, model.d_model)
        self.end = nn.Parameter(torch.randn(model.d_model))
        self.embedding_dropout = nn.Dropout(model.embedding_dropout)
        self.dropout = nn.Dropout(model.head_dropout)

    @classmethod
    def build(cls, config: SequenceHeadConfig, model: TaskModelConfig) -> SequenceHead:
        return cls(config, model)

    def share(self, stems: Mapping[str, nn.Module]) -> None:
        if self.config.share is None:
            return
        table = cast("nn.Parameter", stems[self.config.share].weight)
        self.output = table if self.config.tied else self.output
        self.table = table

    @property
    def moe_layers(self) -> list[MoE]:
        return self.decoder.moe_layers

    def run(self, hidden: Hidden, targets: Tensor | None = None) -> HeadOutput:
        memory = self.memory(hidden.x, hidden.mask)
        if targets is not None:
            out = self.states(memory, targets, hidden.elastic)
            return HeadOutput(out.hidden_states, out.layer_losses, out.routing)
        said = self.generate(memory, elastic=hidden.elastic)
        # read once more in one piece: what each token's probability was, and which experts it went to
        out = self.states(memory, said, hidden.elastic)
        log_probs = self._log_probs(out.hidden_states).gather(2, said.clamp(min=0)[..., None])[..., 0]
        known = said != IGNORED
        answer = torch.stack([torch.where(known, part, 0.0) for part in (said.float(), log_probs)], dim=-1)
        return HeadOutput(answer, out.layer_losses, out.routing)

    def memory(self, x: Tensor, mask: Tensor | None) -> Memory:
        """What the decoder looks at: the backbone's vectors `[B, S, D]`, and a learnt one behind the last real one.

        By their places alone the decoder could not tell the last token of a text from one before it.
        """
        places = torch.arange(x.shape[1] + 1, device=x.device)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        behind = places == (real * places[1:]).amax(dim=1, keepdim=True)
        padded = torch.where(behind[..., None], self.end.to(x.dtype), F.pad(x, (0, 0, 0, 1)))
        return Memory(padded, F.pad(real, (0, 1)) | behind)

    def states(self, memory: Memory, targets: Tensor, elastic: Elastic | None = None) -> BackboneOutput:
        """What predicts each of the targets `[B, T]`: the decoder's states `[B, T, D]` after those before it."""
        counts = targets != IGNORED
        before = F.pad(targets.masked_fill(~counts, END), (1, -1), value=END)
        out = self.decoder(
            self._embedded(before), token_ids=before, token_mask=None if bool(counts.all()) else counts,
            memory=memory, elastic=elastic,
        )  # fmt: skip
        out.hidden_states = self.dropout(out.hidden_states)
        return out

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        flat, states = targets.flatten(), answer.flatten(0, 1)
        known = flat != IGNORED
        n = int(known.sum())
        mean, _ = linear_cross_entropy(states, self.output, flat)
        share = self.config.smoothing if self.training else 0.0
        if share > 0 and n > 0:
            # smoothing mixes in the mean over all ids of -log p, which differs from -log p of the target by the
            # target's logit less the mean logit: no [N, V] table is needed for it
            states, wanted = states[known], flat[known]
            logits = (states * F.embedding(wanted, self.output)).sum(dim=-1) - states @ self.output.mean(
                dim=0
            )
            mean = mean + share * logits.float().mean()
        return mean, n

    def token_losses(self, answer: Tensor, targets: Tensor) -> Tensor:
        """`[B, T]` -log p of each target, 0 where nothing counts, of the answer that `run` gave for them."""
        _, each = linear_cross_entropy(answer.flatten(0, 1), self.output, targets.flatten())
        return each.view(targets.shape)

    @torch.no_grad()
    def generate(
        self, memory: Memory, beams: int | None = None, cached: bool = True, elastic: Elastic | None = None
    ) -> Tensor:
        """`[B, T]` token ids of the likeliest answers, -100 behind their ends.

        Args:
            memory: what is answered to.
            beams: of the search; those of the configuration where None.
            cached: keep keys and values of earlier tokens. Routers that read earlier tokens have them computed again.
            elastic: the routing of the call.
        """
        config, n = self.config, memory.x.shape[0]
        cached = cached and not any(layer.router.reads_history for layer in self.moe_layers)
        found, _ = search(
            _Reader(self, memory, cached, elastic), n, first=END, end=END, max_len=config.max_len,
            beams=config.beams if beams is None else beams, alpha=config.length_penalty,
        )  # fmt: skip
        longest = max(len(ids) for ids in found)
        padded = [[*ids, *[IGNORED] * (longest - len(ids))] for ids in found]
        return torch.tensor(padded, device=memory.x.device)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_dropout(F.embedding(token_ids, self.table))
        return embedded

    def _log_probs(self, states: Tensor) -> Tensor:
        return F.linear(states, self.output).float().log_softmax(dim=-1)


class _Reader:
    """The decoder at the end of what has been generated so far."""

    def __init__(self, head: SequenceHead, memory: Memory, cached: bool, elastic: Elastic | None) -> None:
        self.elastic = elastic
        self.head, self.memory = head, Memory(memory.x, memory.mask, held={})
        config = head.decoder.config
        batch = memory.x.shape[0]
        self.cache = (
            KVCache.for_config(config, batch, head.config.max_len, memory.x.dtype, memory.x.device)
            if cached
            else None
        )
        self.text = torch.empty(batch, 0, dtype=torch.long)

    def read(self, token_ids: Tensor) -> Tensor:
        self.text = torch.cat([self.text, token_ids[:, None]], dim=1)
        new = (self.text if self.cache is None else token_ids[:, None]).to(self.memory.x.device)
        out = self.head.decoder(
            self.head._embedded(new),
            token_ids=new,
            cache=self.cache,
            memory=self.memory,
            elastic=self.elastic,
        )
        log_probs = self.head._log_probs(out.hidden_states[:, -1])
        log_probs[:, list(self.head.config.never)] = -torch.inf
        return log_probs

    def keep_rows(self, rows: Tensor) -> None:
        if len(rows) == len(self.text) and bool((rows == torch.arange(len(rows))).all()):
            return
        self.memory.keep_rows(rows.to(self.memory.x.device))
        self.text = self.text[rows]
        if self.cache is not None:
            self.cache.keep_rows(rows)


def decoder_config(model: TaskModelConfig, layers: int) -> BackboneConfig:
    """Layers like the backbone's first ones, dense where none of so few would be sparse."""
    fields = {name: getattr(model, name) for name in BackboneConfig.model_fields}
    fields |= {
        "n_layers": layers,
        "dense_layers": tuple(index for index in model.dense_layers if index < layers),
        "moe_by_layer": {index: moe for index, moe in model.moe_by_layer.items() if index < layers},
    }
    # a window, and which layers have it, are matters of long inputs
    fields |= {"sliding_window": None, "sliding_layers": None}
    if not any(model.is_moe_layer(index) for index in range(layers)):
        fields |= {"moe": None, "moe_by_layer": {}, "dense_layers": (), "n_dense_layers": 0}
    return BackboneConfig.from_dict(fields, where="model")


def _table(size: int, d_model: int) -> nn.Parameter:
    """Vectors of length about 1, as those of stems: logits of normed states then begin near 1."""
    return nn.Parameter(torch.randn(size, d_model) * d_model**-0.5)
