"""The decoder: what it generates is what its probabilities say, whichever way they are computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moekit.config.errors import ConfigError
from moekit.config.task import TaskModelConfig
from moekit.layers.balancing import weighted_aux_loss
from moekit.layers.cross_attention import CrossAttention, Memory
from moekit.layers.elastic import Elastic
from moekit.models.beam_search import length_penalty
from moekit.models.task_model import TaskModel

V, B = 13, 6
SOURCE = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0], [3, 3, 4, 0], [12, 11, 10, 9], [5, 6, 0, 0]])
TARGETS = torch.tensor([[4, 5, 0, -100], [6, 0, -100, -100], [0, -100, -100, -100], [7, 8, 9, 0],
                        [2, 2, 2, 2], [-100, -100, -100, -100]])  # fmt: skip


def made(**fields) -> TaskModel:
    head = {
        "kind": "sequence",
        "vocab_size": V,
        "layers": 2,
        "max_len": 12,
        "tied": False,
        **fields.pop("head", {}),
    }
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 12, **fields.pop("moe", {})}
    torch.manual_seed(1)
    model = TaskModel(TaskModelConfig.from_dict({
        "d_model": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "init_std": 0.4, "moe": moe,
        "stems": {"text": {"kind": "tokens", "vocab_size": V}}, "heads": {"answer": head}, **fields,
    }))  # fmt: skip
    with torch.no_grad():  # decisive: no two tokens about equally likely
        model.heads["answer"].output.mul_(2.0)
        model.heads["answer"].output[0] *= 2.0  # and some answers end early
    return model.eval()


def memory_of(model: TaskModel) -> Memory:
    hidden = model({"text": {"ids": SOURCE}}, {"answer": TARGETS}).hidden_states
    return model.heads["answer"].memory(hidden, SOURCE != 0)


def log_probs(model: TaskModel, ids: torch.Tensor) -> torch.Tensor:
    """`[B, T, V]` of teacher forcing."""
    head = model.heads["answer"]
    states = head.states(memory_of(model), ids).hidden_states
    return F.linear(states, head.output).log_softmax(dim=-1)


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "hash"])
@pytest.mark.parametrize("cached", [True, False])
def test_greedy_is_the_argmax_of_teacher_forcing_at_every_step(router, cached):
    model = made(moe={"router": router})
    with torch.no_grad():
        said = model.heads["answer"].generate(memory_of(model), beams=1, cached=cached)
        forced = log_probs(model, said).argmax(dim=-1)
    known = said != -100
    assert torch.equal(forced[known], said[known])
    lengths = known.sum(dim=1)
    assert lengths.min() < lengths.max(), "some end early"
    for row, length in zip(said, lengths.tolist(), strict=True):
        assert row[length - 1] == 0 or length == 12


@pytest.mark.parametrize("beams", [1, 3])
def test_the_cache_changes_nothing(beams):
    model = made()
    head, memory = model.heads["answer"], memory_of(model)
    assert torch.equal(head.generate(memory, beams, cached=True), head.generate(memory, beams, cached=False))


def test_more_beams_are_never_less_likely_than_greedy():
    model = made(head={"length_penalty": 0.8})
    head, memory = model.heads["answer"], memory_of(model)

    def scores(beams: int) -> torch.Tensor:
        said = head.generate(memory, beams)
        known = said != -100
        each = log_probs(model, said).gather(2, said.clamp(min=0)[..., None])[..., 0]
        return each.masked_fill(~known, 0.0).sum(dim=1) / length_penalty(known.sum(dim=1), 0.8)

    with torch.no_grad():
        one, five = scores(1), scores(5)
    assert (five >= one - 1e-5).all()
    assert (five > one + 1e-3).any(), "else the beams do nothing"


def test_what_is_answered_are_ids_and_their_probabilities():
    model = made(head={"never": [1, 4]})
    with torch.no_grad():
        out = model({"text": {"ids": SOURCE}})
        answer = out.answers["answer"]
        ids = answer[..., 0].long()
        lengths = [row.index(0) + 1 if 0 in row else len(row) for row in ids.tolist()]
        padded = ids.clone()
        for row, length in enumerate(lengths):
            padded[row, length:] = -100
        expected = log_probs(model, padded).gather(2, ids[..., None])[..., 0]
    assert not (set(ids.flatten().tolist()) & {1, 4})
    for row, length in enumerate(lengths):
        torch.testing.assert_close(answer[row, :length, 1], expected[row, :length], rtol=1e-4, atol=1e-5)
        assert (answer[row, length:] == 0).all()
    # the experts of the backbone's layer and of the decoder's two
    assert len(out.routing) == len(model.moe_layers) == 3
    assert int(out.routing[-1].tokens_per_expert.sum()) == 2 * sum(lengths)


def test_the_decoder_sees_where_a_text_ends():
    head = made().heads["answer"]
    x = torch.randn(3, 4, head.end.shape[0])
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    memory = head.memory(x, mask)
    assert memory.mask.tolist() == [
        [True, True, True, False, False], [True] * 5, [True, False, False, False, False]
    ]  # fmt: skip
    for row, place in enumerate((2, 4, 0)):
        assert torch.equal(memory.x[row, place], head.end)
    assert torch.equal(memory.x[:2, :2], x[:2, :2])
    assert torch.equal(memory.x[1, :4], x[1])
    assert torch.equal(head.memory(x, None).x[:, 4], head.end.expand(3, -1))


def test_later_tokens_change_no_earlier_state():
    model = made()
    other = TARGETS.clone()
    other[3, 2] = 11
    with torch.no_grad():
        first, second = (
            model({"text": {"ids": SOURCE}}, {"answer": targets}).answers["answer"]
            for targets in (TARGETS, other)
        )
    # the token at place 2 is read at place 3
    torch.testing.assert_close(first[3, :3], second[3, :3])
    assert not torch.allclose(first[3, 3], second[3, 3])


def test_the_input_is_looked_at_and_its_padding_is_not():
    model = made(d_model=16)
    longer = F.pad(SOURCE, (0, 3))
    changed = SOURCE.clone()
    changed[0, 1] = 8
    with torch.no_grad():
        short, long, other = (
            model({"text": {"ids": ids}}, {"answer": TARGETS}).answers["answer"]
            for ids in (SOURCE, longer, changed)
        )
        generated = [model({"text": {"ids": ids}}).answers["answer"] for ids in (SOURCE, longer)]
    counts = TARGETS != -100
    torch.testing.assert_close(short[counts], long[counts], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*generated, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[0], short[0])
    torch.testing.assert_close(other[1:][counts[1:]], short[1:][counts[1:]], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_tokens():
    model = made()
    with torch.no_grad():
        out = model({"text": {"ids": SOURCE}}, {"answer": TARGETS})
        expected = F.nll_loss(log_probs(model, TARGETS).flatten(0, 1), TARGETS.flatten(), ignore_index=-100)
        wider = F.pad(TARGETS, (0, 2), value=-100)
        again = model({"text": {"ids": SOURCE}}, {"answer": wider})
        each = model.heads["answer"].token_losses(out.answers["answer"], TARGETS)
    assert out.n_targets == 14
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(again.loss, out.loss)
    torch.testing.assert_close(each.sum() / 14, out.loss)
    assert (each[TARGETS == -100] == 0).all()


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_smoothing_is_that_of_torch_and_only_in_training(smoothing):
    model = made(head={"smoothing": smoothing})
    head = model.heads["answer"]
    memory = memory_of(model)
    states = head.states(memory, TARGETS).hidden_states.detach().requires_grad_()
    logits = F.linear(states, head.output)
    expected = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), label_smoothing=smoothing)
    (wanted,) = torch.autograd.grad(expected, states)
    head.train()
    loss, _ = head.loss(states, TARGETS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, states)[0], wanted, rtol=1e-4, atol=1e-6)
    head.eval()
    plain = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    torch.testing.assert_close(head.loss(states, TARGETS)[0], plain)


def test_the_decoders_balancing_loss_is_in_the_total():
    model = made(moe={"balance": {"load_balance": 0.5}})
    out = model({"text": {"ids": SOURCE}}, {"answer": TARGETS})
    total = out.loss + weighted_aux_loss(out.aux_losses, model.config.moe.balance)
    routers = [layer.router.weight for layer in model.heads["answer"].moe_layers]
    assert len(routers) == 2
    for router in routers:
        (gradient,) = torch.autograd.grad(total - out.loss, router, retain_graph=True)
        assert float(gradient.norm()) > 0
    assert float(out.aux_losses["load_balance"].detach()) == pytest.approx(
        sum(float(losses) for losses in _balance_of_each(model)) / 3, rel=1e-4
    )


def _balance_of_each(model: TaskModel) -> list[torch.Tensor]:
    """The balancing loss of the backbone's layer and of each layer of the decoder, caught where they are computed."""
    found = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: found.append(out.aux_losses["load_balance"]))
             for layer in model.moe_layers]  # fmt: skip
    with torch.no_grad():
        model({"text": {"ids": SOURCE}}, {"answer": TARGETS})
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_table_is_one_parameter(tied):
    model = made(head={"share": "text", "tied": tied})
    head = model.heads["answer"]
    assert head.table is model.stems["text"].weight
    assert (head.output is head.table) == tied
    n = sum(p.numel() for p in model.parameters())
    alone = sum(p.numel() for p in made(head={"tied": tied}).parameters())
    assert alone - n == V * 16
    other = made(head={"share": "text", "tied": tied})
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        pair = [m({"text": {"ids": SOURCE}}, {"answer": TARGETS}).answers["answer"] for m in (model, other)]
    assert torch.equal(*pair)


def test_few_layers_without_a_sparse_one_are_dense():
    model = made(head={"layers": 1}, n_layers=2, moe_every=2)
    assert len(model.moe_layers) == 1
    assert model.heads["answer"].moe_layers == []


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"router 'expert_choice'.*Choose another"):
        made(moe={"router": "expert_choice", "balance": {"load_balance": 0.0, "router_z": 0.0}})
    with pytest.raises(ConfigError, match=r"heads.answer.share must be a stem of kind tokens"):
        made(head={"share": "picture"})
    with pytest.raises(ConfigError, match=r"same vocab_size \(9\)"):
        made(head={"share": "text", "vocab_size": 9})
    with pytest.raises(ConfigError, match="memory must be given"):
        made().heads["answer"].decoder(torch.randn(1, 2, 16))
    with pytest.raises(ConfigError, match="memory must be left out"):
        made().backbone(torch.randn(1, 2, 16), memory=Memory(torch.randn(1, 2, 16)))


def test_cross_attention_is_that_of_torch():
    torch.manual_seed(0)
    layer = CrossAttention(8, n_heads=2, n_kv_heads=2, d_head=4)
    plain = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.kv.weight]))
        plain.out_proj.weight.copy_(layer.out.weight)
    x, held = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    expected, _ = plain(x, held, held, key_padding_mask=~(mask | ~mask.any(1, keepdim=True)))
    torch.testing.assert_close(layer(x, Memory(held, mask)), expected)
    torch.testing.assert_close(layer(x, Memory(held)), plain(x, held, held)[0])


def test_keys_and_values_are_kept_and_follow_the_rows():
    torch.manual_seed(0)
    layer = CrossAttention(8, n_heads=4, n_kv_heads=2, d_head=2)
    held = torch.randn(3, 4, 8)
    memory = Memory(
        held, torch.tensor([[True, True, False, False], [True] * 4, [True, False, False, False]]), {}
    )
    x = torch.randn(3, 1, 8)
    first = layer(x, memory)
    memory.x = torch.zeros_like(memory.x)  # no longer looked at
    torch.testing.assert_close(layer(x, memory), first)
    memory.keep_rows(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(layer(x[[2, 0, 2]], memory), first[[2, 0, 2]])


def test_a_setting_of_the_call_reaches_the_decoder():
    model = made()
    one = made(moe={"top_k": 1, "router": {"name": "softmax", "normalize": "before"}})
    other = made(moe={"router": {"name": "softmax", "normalize": "before"}})
    one.load_state_dict(other.state_dict())
    n = int((TARGETS != -100).sum())
    with torch.no_grad():
        out = model({"text": {"ids": SOURCE}}, {"answer": TARGETS}, elastic=Elastic(top_k=1))
        assert [int(plan.requested.sum()) for plan in out.routing] == [int((SOURCE != 0).sum()), n, n]
        said = other({"text": {"ids": SOURCE}}, elastic=Elastic(top_k=1)).answers["answer"]
        assert torch.equal(
            said, one({"text": {"ids": SOURCE}}).answers["answer"]
        )  # what it generates as well
