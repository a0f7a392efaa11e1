"""The decoder language model: token stem, backbone, language-model head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.config.errors import require
from moekit.config.model import ModelConfig
from moekit.layers.attention import KeyValueCache
from moekit.layers.elastic import Elastic
from moekit.layers.moe import MoE
from moekit.models.backbone import Backbone
from moekit.models.heads import LanguageModelHead
from moekit.models.output import LanguageModelOutput
from moekit.models.stems import TokenStem


class LanguageModel(nn.Module):
    """A decoder, dense or sparse, on token ids `[B, S]`.

    >>> import torch
    >>> from moekit import MoEConfig, ModelConfig
    >>> model = LanguageModel(ModelConfig(vocab_size=300, d_model=32, n_layers=2, moe=MoEConfig(d_expert=16)))
    >>> ids = torch.randint(0, 300, (2, 7))
    >>> out = model(ids, targets=ids)
    >>> out.logits.shape, len(out.routing), sorted(out.aux_losses)
    (torch.Size([2, 7, 300]), 2, ['load_balance', 'router_z'])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = TokenStem(config.vocab_size, config.d_model, config.embedding_scale)
        self.backbone = Backbone(config, may_look_ahead=config.allow_noncausal_router)
        self.head = LanguageModelHead(
            config.vocab_size, config.d_model, self.stem.weight if config.tie_embeddings else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights from torch's global generator."""
        std = self.config.embedding_std if self.config.embedding_std is not None else self.config.init_std
        nn.init.normal_(self.stem.weight, std=std)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=std)
        self.backbone.reset_parameters()

    @property
    def moe_layers(self) -> list[MoE]:
        """The sparse layers, first layer first."""
        return self.backbone.moe_layers

    def forward(
        self,
        token_ids: Tensor,
        *,
        targets: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        memory: None = None,
        cache: KeyValueCache | None = None,
        earlier_counts: list[Tensor] | None = None,
        return_logits: bool = True,
        return_token_losses: bool = False,
        elastic: Elastic | None = None,
        shift: Tensor | None = None,
    ) -> LanguageModelOutput:
        """Predict the next token at every position.

        Args:
            token_ids: `[B, S]`.
            targets: `[B, S]` next tokens, -100 where none counts.
            segment_ids: `[B, S]` document of each token; attention stays inside a document.
            token_mask: `[B, S]` False at padding.
            memory: always None; Transformer-XL carries one.
            cache: keys and values of earlier tokens.
            earlier_counts: per sparse layer, see `moekit.layers.plan.RoutingContext`.
            return_logits: False saves the `[B, S, V]` tensor where only the loss is needed.
            return_token_losses: also return the loss of each position.
            elastic: experts per token, and which may be chosen, in this call alone: `Elastic(top_k=1)`.
            shift: `[B, S, D]`, added to the tokens' vectors.
        """
        require(
            token_ids.dim() == 2, "token_ids", tuple(token_ids.shape), "must have shape [batch, sequence]"
        )
        require(memory is None, "memory", type(memory).__name__, "must be None: a decoder carries no memory",
                "Pass a cache for generation")  # fmt: skip
        vectors = self.stem(token_ids)
        out = self.backbone(
            vectors if shift is None else vectors + shift,
            token_ids=token_ids,
            segment_ids=segment_ids,
            token_mask=token_mask,
            cache=cache,
            earlier_counts=earlier_counts,
            elastic=elastic,
        )
        result = LanguageModelOutput(out.hidden_states, aux_losses=out.aux_losses, routing=out.routing)
        if return_logits:
            result.logits = self.head.logits(out.hidden_states)
        if targets is not None:
            result.loss, each, result.n_targets = self.head.loss(out.hidden_states, targets)
            result.token_losses = each if return_token_losses else None
        return result
