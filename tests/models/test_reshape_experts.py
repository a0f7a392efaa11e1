"""A layer whose experts are split, revived or dropped: what its model answers then."""

import pytest
import torch

from moekit import ModelConfig, MoEConfig
from moekit.compress.prune import pruned
from moekit.config.errors import ConfigError
from moekit.models.language_model import LanguageModel
from moekit.models.reshape_experts import Reshape, reshape_layer

E = 4
ROUTERS = {
    "after": {"name": "softmax"},
    "before": {"name": "softmax", "normalize": "before"},
    "ones": {"name": "softmax", "normalize": "ones"},
    "sigmoid": {"name": "sigmoid"},
}


def model(router="after", top_k=2, **moe):
    torch.manual_seed(0)
    fields = {
        "n_experts": E,
        "d_expert": 8,
        "top_k": top_k,
        "router": ROUTERS[router],
        "families": True,
        **moe,
    }
    return LanguageModel(
        ModelConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, init_std=0.3, moe=fields)
    )


def loss_of(made, ids):
    with torch.no_grad():
        out = made(ids, targets=ids)
    return float(out.loss), out.aux_losses, out


@pytest.fixture
def ids():
    return torch.randint(0, 50, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.filterwarnings("ignore::moekit.config.errors.UntaughtRouterWarning")
def test_a_split_changes_the_loss_by_no_more_than_its_perturbation(router, top_k, ids):
    before = loss_of(model(router, top_k), ids)
    jumps = []
    for perturbation in (1e-2, 1e-4):
        made = model(router, top_k)
        for layer in (0, 1):
            split = Reshape.split(range(E), range(E), range(E))
            reshape_layer(made, layer, split, perturbation, seed=(layer,))
        after = loss_of(made, ids)
        jumps.append(abs(after[0] - before[0]))
        assert after[0] == pytest.approx(before[0], abs=30 * perturbation)
        z, of_halves = (loss["router_z"] for loss in (before[1], after[1]))
        assert float(of_halves) == pytest.approx(float(z), abs=30 * perturbation)
        for old, new in zip(before[2].routing, after[2].routing, strict=True):
            # the halves together have the use that the whole had, and both have some
            halves = new.requested.view(2, E)
            if perturbation == 1e-4:
                assert torch.equal(halves.sum(dim=0), old.requested)
                assert (halves > 0).sum() > E
    assert jumps[1] <= max(jumps[0], 2e-6)


def test_without_a_perturbation_only_rounding_differs(ids):
    plain, made = model(), model()
    reshape_layer(made, 0, Reshape.split(range(E), range(E), [2]))
    want, got = plain(ids), made(ids)
    assert torch.allclose(got.logits, want.logits, atol=1e-5)
    halves = got.routing[0].requested
    assert torch.equal(halves[:E] + halves[E:] * (torch.arange(E) == 2), want.routing[0].requested)


def test_plain_top_k_would_jump(ids):
    """Why there are families: without them both copies of an expert are chosen and push another one out."""
    before = loss_of(model(), ids)[0]
    made = model()
    reshape_layer(made, 0, Reshape.split(range(E), range(E), range(E)), 1e-4)
    made.moe_layers[0].router.family.copy_(torch.arange(2 * E))
    assert abs(loss_of(made, ids)[0] - before) > 0.01


def seen_positive(made):
    """Let the first router see tokens of positive parts alone, so that a row of negative ones is never chosen."""
    made.moe_layers[0].router.register_forward_pre_hook(lambda module, args: (args[0].abs() + 0.1, *args[1:]))
    return made


def with_dead_expert(expert):
    made = seen_positive(model())
    made.moe_layers[0].router.weight.data[expert] = -5.0
    return made


def test_a_dead_expert_that_is_revived_changes_nothing_but_its_use(ids):
    made = with_dead_expert(3)
    want = made(ids)
    assert int(want.routing[0].requested[3]) == 0
    source = int(want.routing[0].requested.argmax())
    reshape_layer(made, 0, Reshape.revive(range(E), 3, source), 1e-4)
    got = seen_positive(made)(ids)
    assert torch.allclose(got.logits, want.logits, atol=5e-3)
    use, before = got.routing[0].requested, want.routing[0].requested
    assert int(use[3]) > 0
    assert int(use[3] + use[source]) == int(before[source])


def test_dropping_what_nobody_chose_changes_nothing(ids):
    made = with_dead_expert(1)
    want = made(ids)
    reshape_layer(made, 0, Reshape.keep(range(E), [0, 2, 3]))
    assert torch.allclose(seen_positive(made)(ids).logits, want.logits, atol=1e-5)
    assert made.config.moe_of(0).n_experts == 3
    assert made.config.moe_of(1).n_experts == E


def test_the_configuration_follows_and_builds_the_same_model(ids):
    made = model(balance={"bias_update_rate": 0.1})
    reshape_layer(made, 1, Reshape.split(range(E), range(E), [0, 3]), 0.01)
    again = LanguageModel(made.config)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(ids).logits, made(ids).logits)
    assert made.moe_layers[1].router.family.tolist() == [0, 1, 2, 3, 0, 3]


def test_a_grown_model_can_be_pruned(ids):
    made = model()
    reshape_layer(made, 0, Reshape.split(range(E), range(E), [0, 3]), 0.01)
    smaller = pruned(made, {0: [1, 3, 5]})
    assert smaller.moe_layers[0].router.family.tolist() == [0, 1, 1]
    assert smaller(ids).routing[0].requested.sum() == 2 * ids.numel()


def test_what_cannot_be():
    made = model(families=False)
    with pytest.raises(ConfigError, match=r"model.moe.families must be true"):
        reshape_layer(made, 0, Reshape.keep(range(E), [0, 1]))
    with pytest.raises(ConfigError, match=r"top_k must be at most the families that stay \(1\); got 2"):
        reshape_layer(model(), 0, Reshape.keep([0, 0, 1, 1], [0, 1]))
    with pytest.raises(ConfigError, match="families must be false with router 'hash'"):
        LanguageModel(ModelConfig(moe=MoEConfig(families=True, router="hash")))
