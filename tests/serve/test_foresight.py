"""What is foreseen: exactly where nothing stands between two layers, by the token where the router reads it."""

from __future__ import annotations

import pytest
import torch
from fitting_models import VOCABULARY, build, write

from moekit.serve.fitting import fit_to_memory
from moekit.serve.memory_plan import plan_memory
from moekit.serve.model_source import find_source


def memory_of(path, slots):
    source = find_source(path)
    try:
        return plan_memory(source, None).memory_for(slots / 24)
    finally:
        source.close()


def without_change(model):
    """Layers add nothing to the stream, so each router reads what the first one read, through its own norm."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.out.weight", "w_out")):
                parameter.zero_()
    return model


def step_by_step(fitted, ids):
    """Single tokens, each layer's experts read by the thread before they are asked for."""
    store, model = fitted.store, fitted.model
    take = store._take

    def patient(keys):
        with store._change:
            store._change.wait_for(lambda: not store._queue and not store._reading)
        return take(keys)

    store._take = patient
    with torch.no_grad():
        for number in range(ids.shape[1]):
            model(ids[:, number : number + 1])
    return store.counts


IDS = torch.randint(1, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(2))


def test_all_is_foreseen_where_the_stream_does_not_change(tmp_path):
    path = write(without_change(build()), tmp_path / "m")
    # each layer's two experts, and the two that come next: nothing survives until the next token
    with fit_to_memory(path, memory_of(path, 4), read_ahead=True) as fitted:
        counts = step_by_step(fitted, IDS)
        assert counts.needed == 30 * 3 * 2
        assert counts.misses == counts.late == 0
        assert counts.hits == counts.needed
        assert counts.unused == 0
        assert counts.read_ahead >= counts.foreseen > 100


def test_without_reading_ahead_the_same_memory_hits_rarely(tmp_path):
    path = write(without_change(build()), tmp_path / "m")
    with fit_to_memory(path, memory_of(path, 4), read_ahead=False) as fitted:
        counts = step_by_step(fitted, IDS)
        assert counts.hits < counts.needed / 3


def test_norms_of_different_weights_are_accounted_for(tmp_path):
    model = without_change(build())
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.feed_forward_norm.weight.normal_()  # signs differ too
    path = write(model, tmp_path / "m")
    with fit_to_memory(path, memory_of(path, 4), read_ahead=True) as fitted:
        counts = step_by_step(fitted, IDS)
        assert counts.hits >= 0.97 * counts.needed  # products of rounded norms may move a tie


def test_routers_that_read_token_ids_are_foreseen_exactly(tmp_path):
    path = write(build({"router": "hash"}), tmp_path / "m")  # the stream changes, which they do not read
    with fit_to_memory(path, memory_of(path, 4), read_ahead=True) as fitted:
        counts = step_by_step(fitted, IDS)
        assert counts.hits == counts.needed


def test_hooks_go_with_close(tmp_path):
    path = write(build(), tmp_path / "m")
    fitted = fit_to_memory(path, memory_of(path, 4), read_ahead=True)
    layers = fitted.model.moe_layers
    assert [len(layer._forward_pre_hooks) for layer in layers] == [1, 1, 0]
    assert len(fitted.model.backbone._forward_pre_hooks) == 1
    fitted.close()
    assert not any(layer._forward_pre_hooks for layer in layers)
    assert not fitted.model.backbone._forward_pre_hooks


@pytest.mark.parametrize("length", [1, 40])
def test_what_is_foreseen_does_not_change_the_answer(tmp_path, length):
    path = write(build(), tmp_path / "m")
    ids = IDS[:, :length].repeat(3, 1)
    answers = []
    for read_ahead in (False, True, None):
        with fit_to_memory(path, memory_of(path, 7), read_ahead=read_ahead) as fitted, torch.no_grad():
            answers.append(fitted.model(ids).logits)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
