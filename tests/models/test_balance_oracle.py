"""Counts, statistics and losses of balancing are those of one plain pass, however the batch was run.

The oracle knows nothing of plans: it reads what the router was given, multiplies it with the router's
weights, and counts the largest values of the tokens that are real.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit import ModelConfig, MoEConfig, build_model
from moekit.layers.balancing import weighted_aux_loss
from moekit.layers.statistics import RoutingStats, add_stats, routing_stats
from moekit.models.language_model import LanguageModel

VOCAB, BATCH, LENGTH = 60, 8, 10
ROUTERS = {
    "softmax": {},
    "sigmoid": {"router": "sigmoid", "balance": {"bias_update_rate": 0.05}},
    "group_limited": {
        "router": {"name": "group_limited", "n_groups": 3, "top_groups": 2, "score": "softmax"}
    },
    "null": {"null_experts": {"zero": 2}},
}
every_router = pytest.mark.parametrize("fields", ROUTERS.values(), ids=ROUTERS.keys())


def small_model(**fields: object) -> LanguageModel:
    config = MoEConfig.from_dict({"n_experts": 6, "d_expert": 8, "top_k": 2} | fields)
    model = build_model(
        ModelConfig(vocab_size=VOCAB, d_model=16, n_layers=3, n_heads=2, n_dense_layers=1, moe=config)
    )
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.router.weight.normal_()
            if layer.router.expert_bias is not None:
                layer.router.expert_bias.normal_(std=0.1)
    return model


def batch(padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, targets, and which tokens are real: rows of different lengths, one of them empty."""
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH))
    lengths = torch.tensor([10, 3, 7, 0, 10, 5, 1, 9]) if padded else torch.full((BATCH,), LENGTH)
    real = torch.arange(LENGTH) < lengths[:, None]
    return ids, torch.where(real, torch.randint(0, VOCAB, ids.shape), -100), real


class Oracle:
    """One plain pass over the batch: counts `[E]`, sums of probabilities, losses, of each sparse layer."""

    def __init__(self, model: LanguageModel, ids: Tensor, real: Tensor) -> None:
        given: list[Tensor] = []
        hooks = [
            layer.router.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
            for layer in model.moe_layers
        ]
        with torch.no_grad():
            model(ids, token_mask=real)
        for hook in hooks:
            hook.remove()
        self.counts, self.losses, self.entropies, self.z = [], [], [], []
        self.n_tokens = int(real.sum())
        for layer, tokens in zip(model.moe_layers, given, strict=True):
            config = layer.config
            logits = tokens[real.view(-1)] @ layer.router.weight.detach().t()
            probs = logits.softmax(dim=-1)
            scores = probs
            if config.router.name == "sigmoid":
                scores = logits.sigmoid()
                probs = scores / scores.sum(dim=-1, keepdim=True)
            value = scores if layer.router.expert_bias is None else scores + layer.router.expert_bias
            counts = [0] * value.shape[1]
            for row in value.tolist():
                allowed = range(len(row))
                if config.router.name == "group_limited":
                    best = sorted(range(3), key=lambda g: -max(row[2 * g : 2 * g + 2]))[:2]
                    allowed = [e for e in allowed if e // 2 in best]
                for e in sorted(allowed, key=lambda e: -row[e])[:2]:
                    counts[e] += 1
            self.counts.append(counts)
            mean = probs.double().mean(dim=0)
            share = torch.tensor(counts).double() / sum(counts)
            self.losses.append(float(len(counts) * (share * mean).sum()))
            self.entropies.append(float(-(probs * probs.log()).sum(dim=-1).double().mean()))
            self.z.append(float(logits.double().logsumexp(dim=-1).square().mean()))

    def check(self, stats: list[RoutingStats]) -> None:
        """Integers exactly, losses to 1e-6."""
        assert [layer.requested_per_expert.tolist() for layer in stats] == self.counts
        for layer, loss, entropy in zip(stats, self.losses, self.entropies, strict=True):
            assert int(layer.n_tokens) == self.n_tokens
            assert int(layer.dropped) == 0
            assert int(layer.requested_per_expert.sum()) == 2 * self.n_tokens
            assert layer.load_balance_loss() == pytest.approx(loss, rel=1e-6)
            assert layer.route_entropy() == pytest.approx(entropy, rel=1e-5)


@every_router
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("n_parts", [1, 2, 4, 8])
def test_counts_and_losses_of_a_step(fields: dict, padded: bool, recompute: bool, n_parts: int) -> None:
    model = small_model(**fields)
    ids, targets, real = batch(padded)
    oracle = Oracle(model, ids, real)
    model.backbone.recompute = recompute
    total: list[RoutingStats] | None = None
    for part_ids, part_targets, part_real in zip(
        *(x.chunk(n_parts) for x in (ids, targets, real)), strict=True
    ):
        earlier = [stats.requested_per_expert for stats in total] if total else None
        out = model(part_ids, targets=part_targets, token_mask=part_real, earlier_counts=earlier)
        (out.loss + weighted_aux_loss(out.aux_losses, model.config.moe.balance)).backward()
        total = add_stats(total, routing_stats(out.routing))
    oracle.check(total)
    if n_parts == 1:
        assert out.aux_losses["load_balance"].item() == pytest.approx(sum(oracle.losses) / 2, rel=1e-6)
        assert out.aux_losses["router_z"].item() == pytest.approx(sum(oracle.z) / 2, rel=1e-5)
    # the last micro-batch has seen the shares of the whole step, so its loss is that of the global batch
    last = Oracle(model, ids.chunk(n_parts)[-1], real.chunk(n_parts)[-1])
    expected = 0.0
    for layer, plan in enumerate(out.routing):
        share = torch.tensor(oracle.counts[layer]) / sum(oracle.counts[layer])
        mask = real.chunk(n_parts)[-1].reshape(-1)
        expected += (plan.n_experts * (share * plan.router_probs[mask].mean(dim=0)).sum()).item() / 2
    if last.n_tokens:
        assert out.aux_losses["load_balance"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_parts", [2, 4])
def test_bias_after_an_accumulated_step_is_that_of_one_pass(padded: bool, n_parts: int) -> None:
    model = small_model(router="sigmoid", balance={"bias_update_rate": 0.05})
    ids, _, real = batch(padded)
    oracle = Oracle(model, ids, real)
    before = [layer.router.expert_bias.clone() for layer in model.moe_layers]
    total = None
    for part_ids, part_real in zip(ids.chunk(n_parts), real.chunk(n_parts), strict=True):
        total = add_stats(total, routing_stats(model(part_ids, token_mask=part_real).routing))
    for layer, stats, bias, counts in zip(model.moe_layers, total, before, oracle.counts, strict=True):
        layer.router.after_step(stats)
        mean = sum(counts) / 6
        expected = [b + 0.05 * ((mean > c) - (mean < c)) for b, c in zip(bias.tolist(), counts, strict=True)]
        assert layer.router.expert_bias.tolist() == pytest.approx(expected, abs=1e-7)


@every_router
def test_counts_of_padded_rows_are_those_of_the_rows_alone(fields: dict) -> None:
    model = small_model(**fields)
    ids, _, real = batch(padded=True)
    together = routing_stats(model(ids, token_mask=real).routing)
    alone = None
    for row, mask in zip(ids, real, strict=True):
        alone = add_stats(alone, routing_stats(model(row[mask][None]).routing))
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.requested_per_expert, theirs.requested_per_expert)
        assert torch.equal(ours.n_tokens, theirs.n_tokens)
        torch.testing.assert_close(ours.prob_sum, theirs.prob_sum, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "router", ["softmax", "noisy_topk", "switch", "gshard", "random", "threshold", "top_p"]
)
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_recomputation_repeats_the_same_routing_bit_for_bit(
    router: str, capacity_factor: float | None
) -> None:
    """Noisy routers too: the recomputed pass must draw the numbers of the first, or gradients are wrong."""
    fields = {"router": router, "top_k": 1 if router == "switch" else 2, "capacity_factor": capacity_factor}
    config = MoEConfig.from_dict(
        {"n_experts": 6, "d_expert": 8, "balance": {"load": 0.1, "importance": 0.1}} | fields
    )
    model = build_model(ModelConfig(vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=2, moe=config))
    ids, targets, real = batch(padded=True)
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        model.backbone.recompute = recompute
        out = model(ids, targets=targets, token_mask=real)
        loss = out.loss + weighted_aux_loss(out.aux_losses, config.balance)
        loss.backward()
        stats = [value for layer in routing_stats(out.routing) for value in vars(layer).values()]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), *out.aux_losses.values(), *stats, *grads])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("n_parts", [2, 4])
def test_gradient_of_an_accumulated_step_is_that_of_one_pass(n_parts: int) -> None:
    model = small_model(balance=None)
    ids, targets, real = batch(padded=True)
    grads = []
    for parts in (1, n_parts):
        model.zero_grad()
        for part_ids, part_targets, part_real in zip(
            *(x.chunk(parts) for x in (ids, targets, real)), strict=True
        ):
            out = model(part_ids, targets=part_targets, token_mask=part_real)
            (out.loss * out.n_targets / int(real.sum())).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
