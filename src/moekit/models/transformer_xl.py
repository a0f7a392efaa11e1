"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860): segment recurrence with relative positions.

Text comes in segments. Each layer attends to its own segment and to a memory: the inputs that the same layer
saw in the segments before, kept without their gradient (section 3.2). Because a memory has no fixed absolute
position, positions enter attention as distances (section 3.3, `moekit.models.relative_attention`).

    h[0] = sqrt(d_model) * embedding[token]
    layer l:   memory[l] = the last `memory_length` rows of (memory[l], h[l]), detached
               h = norm(h[l] + attention(queries from h[l], keys and values from (memory[l], h[l])))
               h[l+1] = norm(h + feed_forward(h))
    logits = h[L] embedding^T

Choices where the paper leaves room:
- u and v are one pair for all layers: in the paper's equations they alone carry no layer index.
- Full softmax. The paper's adaptive softmax saves time for vocabularies of 10^5 and more; at the 10^3 to 10^4
  byte pairs used here it saves nothing, and a comparison with the decoder needs the same output in both.
- Input embeddings are scaled by sqrt(d_model), as in the paper's code: with one matrix for input and output,
  tokens enter at about the size of the layers' answers while the first logits stay near 0.
- A new document starts afresh: attention never leaves the document of its query, in the segment or in memory.
- Dropout, where asked for, falls on embeddings, attention and feed-forward outputs, not on attention
  probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekit.config.errors import ConfigError, require
from moekit.config.model import TransformerXLConfig
from moekit.models.heads import LanguageModelHead
from moekit.models.output import LanguageModelOutput
from moekit.models.relative_attention import relative_attention, sinusoid_table
from moekit.models.stems import TokenStem

Memory = dict[str, Tensor]


class TransformerXL(nn.Module):
    """Language model with segment recurrence; called like the decoder, plus `memory`.

    `output.memory` is a flat dict of detached tensors, ready for a checkpoint: `layer_0` .. `layer_{L-1}`
    `[B, M, D]` (inputs of the layers, oldest first), `segment_ids` `[B, M]` long (the document of each) and
    `filled` `[B, M]` bool (False at padding). M grows to `memory_length` in training and to
    `eval_memory_length` after `.eval()`; a longer memory that is given is cut to the same length, so that
    both modes accept what the other returned.

    >>> import torch
    >>> config = TransformerXLConfig(vocab_size=11, d_model=8, n_layers=2, n_heads=2, memory_length=6)
    >>> model = TransformerXL(config)
    >>> first = model(torch.randint(11, (1, 4)))
    >>> second = model(torch.randint(11, (1, 4)), memory=first.memory)
    >>> second.logits.shape, second.memory["layer_1"].shape
    (torch.Size([1, 4, 11]), torch.Size([1, 6, 8]))
    """

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.stem = TokenStem(config.vocab_size, config.d_model, scale=math.sqrt(config.d_model))
        # one-dimensional, so that an optimizer that spares vectors from weight decay spares these biases too
        self.content_bias = nn.Parameter(torch.zeros(config.n_heads * config.head_width))
        self.position_bias = nn.Parameter(torch.zeros(config.n_heads * config.head_width))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model) if config.pre_norm else nn.Identity()
        tied = self.stem.weight if config.tie_embeddings else None
        self.head = LanguageModelHead(config.vocab_size, config.d_model, tied)
        self.dropout = nn.Dropout(config.dropout)
        self._distance_table: Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights from torch's global generator: normal matrices, zero biases (u and v too)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=self.config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)  # the scale of a layer norm

    @property
    def memory_length(self) -> int:
        """Positions kept for the next segment in the present mode (training or evaluation)."""
        if self.training or self.config.eval_memory_length is None:
            return self.config.memory_length
        return self.config.eval_memory_length

    def forward(
        self,
        token_ids: Tensor,
        *,
        targets: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        memory: Memory | None = None,
        memory_length: int | None = None,
        cache: Any = None,
        return_logits: bool = True,
        return_token_losses: bool = False,
        shift: Tensor | None = None,
    ) -> LanguageModelOutput:
        """Predict the next token at each position of `token_ids` `[B, S]`.

        Args:
            targets: `[B, S]` long, -100 where ignored.
            segment_ids: `[B, S]` number of the document of each token, unique over consecutive segments; None
                for document 0 everywhere.
            token_mask: `[B, S]` False at padding, which no other token sees, now or from the memory.
                Distances count padding, so pad a row that goes on in the next segment on the left.
            memory: `output.memory` of the segment before; None at the start.
            memory_length: positions of memory to use and to keep; None for the length of the present mode.
            cache: must be None; the memory takes the place of a key/value cache.
            shift: `[B, S, D]`, added to the tokens' vectors.
        """
        require(
            cache is None, "cache", type(cache).__name__, "is for the decoder", "Pass memory=output.memory"
        )
        batch = token_ids.shape[0]
        if segment_ids is None:
            segment_ids = torch.zeros_like(token_ids)
        real = token_mask if token_mask is not None else torch.ones_like(token_ids, dtype=torch.bool)
        keep = self.memory_length if memory_length is None else memory_length
        memory = self._recent(memory, batch, keep)
        mask = _attention_mask(segment_ids, real, memory, self._compute_dtype)
        distances = self._distances(mask.shape[2], token_ids.device)

        vectors = self.stem(token_ids)
        hidden = self.dropout(vectors if shift is None else vectors + shift)
        kept: Memory = {}
        for index, layer in enumerate(self.layers):
            name = f"layer_{index}"
            past = None if memory is None else memory[name].to(hidden.dtype)
            kept[name] = _latest(past, hidden, keep).detach()
            arguments = (hidden, past, distances, self.content_bias, self.position_bias, mask)
            if self.recompute and self.training:
                hidden = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden = layer(*arguments)
        hidden = self.final_norm(hidden)
        kept["segment_ids"] = _latest(None if memory is None else memory["segment_ids"], segment_ids, keep)
        kept["filled"] = _latest(None if memory is None else memory["filled"], real, keep)

        output = LanguageModelOutput(hidden_states=hidden, memory=kept)
        if targets is not None:
            output.loss, token_losses, output.n_targets = self.head.loss(hidden, targets)
            output.token_losses = token_losses if return_token_losses else None
        if return_logits:
            output.logits = self.head.logits(hidden)
        return output

    @property
    def _compute_dtype(self) -> torch.dtype:
        weight = self.stem.weight
        device = weight.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def _recent(self, memory: Memory | None, batch: int, keep: int) -> Memory | None:
        """The last `keep` positions of a memory that fits this model and batch; None where there are none."""
        if memory is None:
            return None
        expected = {f"layer_{i}" for i in range(len(self.layers))} | {"segment_ids", "filled"}
        if set(memory) != expected:
            raise ConfigError(
                f"memory must hold {', '.join(sorted(expected))}; got {', '.join(sorted(memory))}. "
                "Pass output.memory of the same model, or None at the start"
            )
        rows = memory["filled"].shape[0]
        require(rows == batch, "memory", f"a memory of {rows} rows",
                f"must have as many rows as token_ids ({batch})", "Pass None to start afresh")  # fmt: skip
        length = min(keep, memory["filled"].shape[1])
        if length == 0:
            return None
        return {name: tensor[:, -length:] for name, tensor in memory.items()}

    def _distances(self, n_keys: int, device: torch.device) -> Tensor:
        """Encodings `[n_keys + 1, D]` of the distances n_keys .. 0, from a table that is made once."""
        table = self._distance_table
        if table is None or table.device != device or table.shape[0] <= n_keys:
            memory = max(self.config.memory_length, self.config.eval_memory_length or 0)
            longest = self.config.max_seq_len + memory
            if n_keys > longest:
                longest = 2 * n_keys  # a slowly growing segment should not make a new table each time
            with torch.inference_mode(False):  # a table made in inference must serve training too
                table = sinusoid_table(longest + 1, self.config.d_model).to(device)
            self._distance_table = table
        return table[-(n_keys + 1) :].to(self.stem.weight.dtype)


class _Layer(nn.Module):
    """Attention over memory and segment, then a ReLU feed-forward block; residual and layer norm on each."""

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = _Attention(config)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.expand = nn.Linear(config.d_model, config.d_ff)
        self.reduce = nn.Linear(config.d_ff, config.d_model)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, memory: Tensor | None, *positions: Tensor) -> Tensor:
        if self.pre_norm:
            norm = self.attention_norm
            past = None if memory is None else norm(memory)
            hidden = hidden + self.dropout(self.attention(norm(hidden), past, *positions))
            return hidden + self._feed_forward(self.feed_forward_norm(hidden))
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, memory, *positions)))
        return self.feed_forward_norm(hidden + self._feed_forward(hidden))

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.reduce(F.relu(self.expand(hidden))))


class _Attention(nn.Module):
    """The four maps of section 3.3: queries; keys and values from content; keys from distances; output."""

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.head_width
        self.width = width = self.n_heads * self.d_head
        self.qkv = nn.Linear(config.d_model, 3 * width, bias=False)
        self.relative_key = nn.Linear(config.d_model, width, bias=False)
        self.out = nn.Linear(width, config.d_model, bias=False)

    def forward(
        self, hidden: Tensor, memory: Tensor | None, distances: Tensor, u: Tensor, v: Tensor, mask: Tensor
    ) -> Tensor:
        """Shapes: hidden `[B, S, D]`, memory `[B, M, D]`, distances `[K + 1, D]`, u and v `[H * Dh]`."""
        batch, length, _ = hidden.shape
        heads = (self.n_heads, self.d_head)
        query, key_value = self.qkv(hidden).split([self.width, 2 * self.width], dim=-1)
        if memory is not None:
            # a product of its own, rather than one of the joined inputs: no gradient is computed for the
            # memory
            past = F.linear(memory, self.qkv.weight[self.width :])
            key_value = torch.cat([past, key_value], dim=1)
        scale = self.d_head**-0.5
        attended = relative_attention(
            ((query + u.to(query.dtype)) * scale).view(batch, length, *heads),
            ((query + v.to(query.dtype)) * scale).view(batch, length, *heads),
            key_value.unflatten(-1, (2, *heads)),
            self.relative_key(distances).view(-1, *heads),
            mask,
        )
        return self.out(attended.reshape(batch, length, -1))


def _latest(past: Tensor | None, present: Tensor, keep: int) -> Tensor:
    """The last `keep` positions of past and present together, along dimension 1."""
    from_past = min(keep - present.shape[1], 0 if past is None else past.shape[1])
    if past is not None and from_past > 0:
        return torch.cat([past[:, -from_past:], present], dim=1)
    return present[:, max(present.shape[1] - keep, 0) :].contiguous()


def _attention_mask(segment_ids: Tensor, real: Tensor, memory: Memory | None, dtype: torch.dtype) -> Tensor:
    """`[B, S, K]`: 0 where a query may see a key and -inf elsewhere.

    A query sees itself and, of its own document, the earlier tokens that are no padding.
    """
    length = segment_ids.shape[1]
    key_ids, key_real = segment_ids, real
    if memory is not None:
        key_ids = torch.cat([memory["segment_ids"], segment_ids], dim=1)
        key_real = torch.cat([memory["filled"], real], dim=1)
    n_keys = key_ids.shape[1]
    allowed = (segment_ids[:, :, None] == key_ids[:, None, :]) & key_real[:, None, :]
    position = torch.arange(n_keys, device=segment_ids.device)
    query_position = position[n_keys - length :, None]
    # every query sees itself, so that no row of the softmax is empty, even at padding
    allowed = (allowed & (position < query_position)) | (position == query_position)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill_(~allowed, -math.inf)
