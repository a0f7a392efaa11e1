"""The encoder: texts to vectors or classes, dense or sparse (BERT, MiniLM).

Shape legend: B texts, S tokens, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.config.encoder import EncoderConfig
from moekit.config.errors import require
from moekit.layers.elastic import Elastic
from moekit.layers.experts import MLP, StackedMLP
from moekit.layers.full_attention import FullAttention
from moekit.layers.moe import MoE
from moekit.layers.plan import RoutingPlan
from moekit.layers.routing import LearnedRouter
from moekit.models.heads import TextHead
from moekit.models.output import EncoderOutput
from moekit.models.stems import EncoderStem


class EncoderLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + feed_forward(x)), the latter an MLP or a MoE."""

    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        self.attention = FullAttention(config.d_model, config.n_heads)
        self.attention_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        moe = config.moe_of(index)
        self.feed_forward: MoE | MLP
        if moe is not None:
            self.feed_forward = MoE(config.d_model, moe)
        else:
            self.feed_forward = MLP(config.d_model, config.d_ff, activation=config.activation, bias=True)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        token_ids: Tensor,
        token_mask: Tensor | None,
        earlier_counts: Tensor | None,
        seen: Tensor | None = None,
        elastic: Elastic | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], RoutingPlan | None]:
        x = self.attention_norm(x + self.dropout(self.attention(x, token_mask if seen is None else seen)))
        if isinstance(self.feed_forward, MLP):
            return self.feed_forward_norm(x + self.dropout(self.feed_forward(x))), {}, None
        out = self.feed_forward(
            x, token_ids=token_ids, token_mask=token_mask, earlier_counts=earlier_counts, elastic=elastic
        )
        mixed = self.dropout(out.hidden_states.to(x.dtype))
        return self.feed_forward_norm(x + mixed), out.aux_losses, out.routing


class Encoder(nn.Module):
    """An encoder on token ids `[B, S]`: a vector for each token, one for the text, and the logits of a classifier.

    >>> import torch
    >>> config = EncoderConfig(vocab_size=300, d_model=32, n_layers=2, labels=("no", "yes"))
    >>> model = Encoder(config)
    >>> out = model(torch.randint(0, 300, (3, 7)), targets=torch.tensor([0, 1, 1]))
    >>> out.hidden_states.shape, out.pooled.shape, out.logits.shape, out.loss.shape
    (torch.Size([3, 7, 32]), torch.Size([3, 32]), torch.Size([3, 2]), torch.Size([]))
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = EncoderStem(
            config.vocab_size, config.d_model, config.max_seq_len, config.n_token_types, config.norm_eps
        )
        self.layers = nn.ModuleList(EncoderLayer(config, index) for index in range(config.n_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.head = TextHead(
            config.d_model,
            pooling=config.pooling,
            pooler=config.pooler,
            normalize=config.normalize,
            n_labels=len(config.labels),
            dropout=config.dropout,
        )
        self.reset_parameters()

    @property
    def moe_layers(self) -> list[MoE]:
        """The sparse feed-forward blocks, first layer first."""
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoE)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw initial weights from torch's global generator: normal, biases zero."""
        std = self.config.init_std
        for table in (self.stem.weight, self.stem.positions, self.stem.types):
            nn.init.normal_(table, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, StackedMLP):
                module.reset_parameters(std, std)
            elif isinstance(module, LearnedRouter):
                module.reset_parameters(std)

    def forward(
        self,
        token_ids: Tensor,
        *,
        token_types: Tensor | None = None,
        token_mask: Tensor | None = None,
        targets: Tensor | None = None,
        earlier_counts: list[Tensor] | None = None,
        elastic: Elastic | None = None,
    ) -> EncoderOutput:
        """Read texts.

        Args:
            token_ids: `[B, S]`.
            token_types: `[B, S]` 0 in the first text and 1 in the second; zeros where None.
            token_mask: `[B, S]` False at padding, which counts nowhere.
            targets: `[B]` numbers of classes, for the loss of a classifier.
            earlier_counts: per sparse layer, see `moekit.layers.plan.RoutingContext`.
            elastic: experts per token, and which may be chosen, in this call alone.
        """
        config = self.config
        require(
            token_ids.dim() == 2, "token_ids", tuple(token_ids.shape), "must have shape [batch, sequence]"
        )
        require(token_ids.shape[1] <= config.max_seq_len, "token_ids", tuple(token_ids.shape),
                f"must hold at most max_seq_len ({config.max_seq_len}) tokens a text", "Cut the texts")  # fmt: skip
        require(targets is None or config.labels, "targets", "classes", "needs a classifier",
                "Set model.labels to the names of the classes")  # fmt: skip
        if token_mask is not None:
            token_mask = token_mask.bool()  # tokenizers give 0 and 1
        # a row of padding alone would have nothing to look at; nothing reads what it looks at
        seen = None if token_mask is None else token_mask | ~token_mask.any(dim=1, keepdim=True)
        x = self.dropout(self.stem(token_ids, token_types))
        counts = iter(earlier_counts or [])
        found: dict[str, list[Tensor]] = {}
        plans: list[RoutingPlan] = []
        for layer in self.layers:
            earlier = next(counts, None) if isinstance(layer.feed_forward, MoE) else None
            x, losses, plan = layer(x, token_ids, token_mask, earlier, seen, elastic)
            for name, loss in losses.items():
                found.setdefault(name, []).append(loss)
            if plan is not None:
                plans.append(plan)
        pooled = self.head.pooled(x, seen)
        out = EncoderOutput(
            x,
            pooled,
            logits=self.head.logits(pooled),
            aux_losses={name: torch.stack(losses).mean() for name, losses in found.items()},
            routing=tuple(plans),
        )
        if targets is not None:
            assert out.logits is not None
            out.loss = nn.functional.cross_entropy(out.logits.float(), targets)
            out.n_targets = targets.numel()
        return out
