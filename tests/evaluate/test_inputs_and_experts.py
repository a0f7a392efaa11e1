"""Which experts each input's tokens go to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.config.task import TaskModelConfig
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.whole import Encoding
from moekit.data.examples import Examples
from moekit.evaluate.inputs_and_experts import experts_of_inputs, in_words, shared_weight, weights_of_inputs
from moekit.models.build import build_model

STEMS = {
    "ear": {"kind": "frames", "n_features": 3},
    "eye": {"kind": "patches", "height": 4, "width": 4, "patch": 2},
}
INPUTS = {
    "ear": {"frames": torch.randn(5, 6, 3), "lengths": torch.tensor([6, 2, 4, 1, 3])},
    "eye": {"pixels": torch.randn(5, 1, 4, 4)},
}


def model(router: str = "softmax", **fields):
    moe = {"n_experts": 6, "top_k": 2, "d_expert": 4, "router": router, "balance": False}
    torch.manual_seed(0)
    return build_model(
        TaskModelConfig.from_dict(
            {
                "d_model": 8,
                "n_layers": 2,
                "n_heads": 2,
                "moe": moe,
                "stems": STEMS,
                "heads": {"same": {"kind": "classify"}},
                **fields,
            }
        )
    ).eval()


def test_every_real_token_counts_once():
    with torch.no_grad():
        out = model()(INPUTS)
    found = weights_of_inputs(out)
    assert out.places == {"ear": slice(0, 6), "eye": slice(6, 10)}
    # a token's two experts weigh 1 together: 6 + 2 + 4 + 1 + 3 frames, and 5 pictures of 4 patches
    np.testing.assert_allclose(found["ear"].sum(axis=1), [16, 16], rtol=1e-6)
    np.testing.assert_allclose(found["eye"].sum(axis=1), [20, 20], rtol=1e-6)
    for layer, plan in enumerate(out.routing):
        experts = [expert for expert, n in enumerate(plan.tokens_per_expert.tolist()) for _ in range(n)]
        wanted = {name: np.zeros(6) for name in STEMS}
        for token, expert, weight in zip(
            plan.token_index.tolist(), experts, plan.row_weight.tolist(), strict=True
        ):
            wanted["ear" if token % 10 < 6 else "eye"][expert] += weight
        for name, weights in wanted.items():
            np.testing.assert_allclose(found[name][layer], weights, rtol=1e-5, atol=1e-9)


def test_soft_slots_count_by_their_weights():
    with torch.no_grad():
        out = model("soft")(INPUTS)
    found = weights_of_inputs(out)
    combine = out.routing[0].slots.combine
    per_expert = combine.shape[2] // 6
    wanted = combine[:, 6:, per_expert : 2 * per_expert].sum()
    assert found["eye"][0, 1] == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_allclose(found["ear"].sum(axis=1), [16, 16], rtol=1e-5)


def test_layers_of_different_sizes():
    with torch.no_grad():
        found = weights_of_inputs(model(moe_by_layer={1: {"n_experts": 3}})(INPUTS))
    assert found["ear"].shape == (2, 6)
    assert (found["ear"][1, 3:] == 0).all()
    np.testing.assert_allclose(found["ear"].sum(axis=1), [16, 16], rtol=1e-6)


def test_shares_over_all_examples_whatever_the_batches():
    rng = np.random.default_rng(0)
    examples = Examples({
        "frames": [rng.normal(size=(rng.integers(1, 9), 3)).astype(np.float32) for _ in range(11)],
        "image": rng.integers(0, 255, (11, 4, 4, 1)).astype(np.uint8), "label": ["a", "b"] * 5 + ["a"],
    })  # fmt: skip
    run = TaskRunConfig.from_dict({
        "inputs": {"ear": {"kind": "audio", "column": "frames"}, "eye": {"kind": "image", "patch": 2}},
        "targets": {"label": {"kind": "class"}},
    })  # fmt: skip
    encoding = Encoding.fit(run.inputs, run.targets, examples)
    built = model(heads={"label": {"kind": "classify", "labels": ["a", "b"]}})
    found, again = (experts_of_inputs(built, encoding, examples, batch_size=size) for size in (64, 3))
    assert set(found) == {"ear", "eye"}
    for name, shares in found.items():
        np.testing.assert_allclose(shares.sum(axis=1), 1)
        np.testing.assert_allclose(shares, again[name], atol=1e-6)
    assert (shared_weight(found) < 1).all()
    assert "layer 2: ear to experts" in in_words(found)


def test_what_is_shared():
    alike = np.array([[0.25, 0.75], [1.0, 0.0]])
    assert shared_weight({"a": alike, "b": alike}).tolist() == [1.0, 1.0]
    assert shared_weight({"a": alike, "b": alike[:, ::-1]}).tolist() == [0.5, 0.0]
