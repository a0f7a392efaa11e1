"""Experts in slots: the kernels find them there, and parts of them one after another give the bits of all together."""

from __future__ import annotations

import pytest
import torch

from moekit.kernels.cpu.decode import LIBRARY, expert_decode
from moekit.kernels.cpu.expert_layer import expert_layer_cpu, expert_rows, sum_rows
from moekit.kernels.expert_weights import ExpertWeights
from moekit.kernels.quantized import quantize

E, D, F, T, K = 6, 64, 96, 5, 3
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not LIBRARY.usable("", torch.float32)(CPU, torch.float32)[0], reason="the CPU kernels cannot run here"
)
SLOTS = torch.tensor([4, 0, 7, 2, 5, 1])


def weights_of(kind):
    ordered = torch.randn(E, 2 * F, D), torch.randn(E, D, F), torch.randn(E, 2 * F), torch.randn(E, D)
    places = [torch.full((9, *part.shape[1:]), torch.nan) for part in ordered]
    for place, part in zip(places, ordered, strict=True):
        place[SLOTS] = part
    if kind in (8, 4):
        places = [torch.nan_to_num(place) for place in places]
        made = [(quantize(a, kind, 32), quantize(b, kind, 32), c, d) for a, b, c, d in (ordered, places)]
    else:
        made = [tuple(part.to(kind) for part in parts) for parts in (ordered, places)]
    return ExpertWeights(*made[0]), ExpertWeights(*made[1]).at(SLOTS)


def tokens_and_choices(dtype):
    index = torch.stack([torch.randperm(E)[:K].sort().values for _ in range(T)])
    return torch.randn(T, D).to(dtype), index, torch.rand(T, K)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, 8, 4], ids=str)
@torch.no_grad()
def test_decoding(kind):
    ordered, placed = weights_of(kind)
    dtype = kind if isinstance(kind, torch.dtype) else torch.float32
    tokens, index, weight = tokens_and_choices(dtype)
    expected = expert_decode(tokens, index, weight, ordered)
    assert placed.n_experts == E
    assert torch.equal(expert_decode(tokens, index, weight, placed), expected)

    total = torch.zeros(T, D)
    for part in ([0], [1, 2, 3], [4, 5]):
        slots = torch.full((E,), -1)
        slots[part] = SLOTS[part]
        total = expert_decode(tokens, index, weight, placed.at(slots), total)
        assert total.dtype == torch.float32
    assert torch.equal(total.to(dtype), expected)


@torch.no_grad()
def test_a_choice_outside_the_experts_is_skipped_with_slots_too():
    _, placed = weights_of(torch.float32)
    tokens, index, weight = tokens_and_choices(torch.float32)
    outside = index.clone()
    outside[:, 1] = torch.tensor([-1, E, E + 3, -7, 99])
    without = weight.clone()
    without[:, 1] = 0
    assert torch.equal(
        expert_decode(tokens, outside, weight, placed), expert_decode(tokens, index, without, placed)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_layer(dtype):
    ordered, placed = weights_of(dtype)
    counts = torch.tensor([70, 0, 3, 1, 150, 0])
    token = torch.cat([torch.arange(n) % 157 for n in counts.tolist()])
    tokens, weight = torch.randn(157, D).to(dtype), torch.rand(int(counts.sum()))
    expected = expert_layer_cpu(tokens, token, weight, counts, ordered, dtype)
    assert torch.equal(expert_layer_cpu(tokens, token, weight, counts, placed, dtype), expected)

    rows, ends = torch.full((len(token), D), torch.nan, dtype=dtype), counts.cumsum(0).tolist()
    for part in ([0], [2, 3], [4]):
        first, last = ends[part[0]] - int(counts[part[0]]), ends[part[-1]]
        these = placed.at(SLOTS[part])
        expert_rows(tokens, token[first:last], weight[first:last], counts[part], these, rows[first:last])
    assert torch.equal(sum_rows(rows, token, len(tokens)), expected)


def test_the_start_must_fit():
    _, placed = weights_of(torch.float32)
    tokens, index, weight = tokens_and_choices(torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"start must be \(5, 64\), float32"):
        expert_decode(tokens, index, weight, placed, torch.zeros(T, D - 32))
