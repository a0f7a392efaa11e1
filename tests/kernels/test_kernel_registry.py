"""The registry of kernels picks what can run, and says why something cannot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moekit import MoE
from moekit.config.errors import ConfigError
from moekit.kernels import registry
from moekit.kernels.registry import available, find, pick, register


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of this test's own, which starts as it is."""
    available("expert_mlp")  # loads
    monkeypatch.setattr(
        registry, "_KERNELS", {op: list(kernels) for op, kernels in registry._KERNELS.items()}
    )
    find.cache_clear()
    yield
    find.cache_clear()


def test_auto_takes_the_first_that_can_run() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        usable = [name for name, can_run, _ in available("expert_mlp", "cpu", dtype) if can_run]
        assert pick("expert_mlp", "cpu", dtype).name == usable[0]
    assert pick("expert_mlp", "cpu", torch.float32).name == "reference"
    assert [name for name, _, _ in available("expert_mlp")][-1] == "reference"


def test_errors_name_the_reason_and_the_choice() -> None:
    with pytest.raises(
        ConfigError, match=r"kernel 'grouped_mm' of expert_mlp cannot run on cpu with torch.float32: needs"
    ):
        pick("expert_mlp", "cpu", torch.float32, "grouped_mm")
    with pytest.raises(
        ConfigError, match=r"kernel must be auto or one of .*got 'refrence'. did you mean 'reference'"
    ):
        pick("expert_mlp", "cpu", torch.float32, "refrence")
    with pytest.raises(
        ConfigError, match="kernel operation 'expert_mpl' is unknown: did you mean 'expert_mlp'"
    ):
        pick("expert_mpl", "cpu", torch.float32)


@pytest.mark.usefixtures("own_kernels")
def test_a_kernel_that_comes_later_is_found() -> None:
    layer, x = MoE(4, d_expert=3, n_experts=2), torch.randn(5, 4)
    layer(x)
    assert pick("expert_mlp", "cpu", torch.float32).name == "reference"

    @register(
        "expert_mlp", "answers_one", priority=99, usable=lambda device, dtype: (device.type == "cpu", "test")
    )
    def answers_one(rows, tokens_per_expert, weights):
        return torch.ones(rows.shape[0], weights.sizes[2])

    torch.testing.assert_close(layer(x).hidden_states, torch.ones(5, 4))
    chosen = MoE(4, d_expert=3, n_experts=2, kernel="reference")
    chosen.load_state_dict(layer.state_dict())
    assert not torch.allclose(chosen(x).hidden_states, torch.ones(5, 4))
