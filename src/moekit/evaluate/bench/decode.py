"""`moekit bench decode`: the experts of a few tokens, as in generation, where reading weights is all the work.

One run passes several layers with weights of their own, each read once, so that none of them waits in a cache.
A speed is that of the active weights: the matrices of every expert that some token chose, each counted once.

Shape legend: L layers, T tokens, D d_model, F d_expert, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.config.errors import require
from moekit.evaluate.bench.checks import Outputs, rounding
from moekit.evaluate.bench.compare import DEFAULT_TIMING, Case, Contestant, TimingOptions, Work, run_case
from moekit.evaluate.bench.experts_of_transformers import (
    IMPLEMENTATIONS,
    ExpertFunction,
    experts_function,
    gathered_bytes,
    too_large,
)
from moekit.evaluate.bench.limits import read_gauge
from moekit.evaluate.bench.sizes import check_sizes
from moekit.evaluate.machine import memory
from moekit.kernels.cpu.decode import expert_decode
from moekit.kernels.expert_weights import ExpertWeights
from moekit.kernels.quantized import quantize_experts
from moekit.kernels.registry import available

BITS = (16, 8, 4)


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of one run.

    Errors: `ConfigError` for a size below 1, or more choices than experts.
    """

    tokens: int = 1
    d_model: int = 2048
    d_expert: int = 1024
    experts: int = 64
    top_k: int = 8
    layers: int = 3

    def __post_init__(self) -> None:
        check_sizes(self)

    @property
    def expert_elements(self) -> int:
        return 3 * self.d_model * self.d_expert


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, and what its tokens chose: `indices` and `chosen`, both `[T, K]`."""

    weights: ExpertWeights
    indices: Tensor
    chosen: Tensor


def run_decode(
    shape: DecodeShape,
    *,
    tokens: Sequence[int] = (1, 4, 16),
    bits: Sequence[int] = BITS,
    group_size: int = 64,
    against: Sequence[str] = ("transformers",),
    timing: TimingOptions = DEFAULT_TIMING,
    seed: int = 0,
) -> list[Case]:
    """One case for each number of tokens; moekit with weights of 16 (bfloat16), 8 and 4 bits."""
    for each in bits:
        require(each in BITS, "--bits", each, f"must be among {', '.join(map(str, BITS))}")
    needed = 2 * shape.layers * shape.experts * shape.expert_elements * (sum(bits) / 16 + (16 not in bits))
    free = memory().available
    require(needed < free, "--layers", shape.layers,
            f"needs {needed / 2**30:.1f} GiB of weights, and {free / 2**30:.1f} GiB are free",
            "Lower it, or --experts")  # fmt: skip
    weights = layer_weights(shape, seed)
    packed = {
        each: [quantize_experts(layer, each, group_size) for layer in weights] for each in bits if each < 16
    }
    cases = []
    for n_tokens in tokens:
        sized = replace(shape, tokens=n_tokens)
        inputs, layers = decode_inputs(sized, weights, seed)
        _, runs, reason = available("expert_decode")[0]
        contestants = [_ours(sized, inputs, layers, each, packed) for each in bits if runs]
        skipped: dict[str, str] = {} if runs else {"moekit": reason}
        for name in IMPLEMENTATIONS if "transformers" in against else ():
            needed = gathered_bytes(weights[0], n_tokens * shape.top_k)
            if name == "batched_mm" and (reason := too_large(needed)):
                skipped[f"transformers {name}"] = reason
                continue
            contestants.append(_theirs(name, sized, inputs, layers))
        gauges = {"bytes": read_gauge()}
        facts = {**asdict(sized), "group_size": group_size}
        word = "token" if n_tokens == 1 else "tokens"
        cases.append(run_case(f"{n_tokens} {word}", facts, contestants, skipped, gauges, timing))
    return cases


def layer_weights(shape: DecodeShape, seed: int) -> list[ExpertWeights]:
    """Random bfloat16 weights of each layer; the hidden values have a standard deviation of about 1."""
    random = torch.Generator().manual_seed(seed)
    d, f = shape.d_model, shape.d_expert

    def filled(*sizes: int, std: float) -> Tensor:
        weight = torch.empty(shape.experts, *sizes, dtype=torch.bfloat16)
        for each in weight:  # one expert at a time: in float32 a layer would take twice its memory
            each.copy_(torch.randn(sizes, generator=random) * std)
        return weight

    return [
        ExpertWeights(filled(2 * f, d, std=d**-0.5), filled(d, f, std=f**-0.5)) for _ in range(shape.layers)
    ]


def decode_inputs(
    shape: DecodeShape, weights: Sequence[ExpertWeights], seed: int
) -> tuple[Tensor, list[Layer]]:
    """Tokens `[T, D]` and the layers with random choices; routing is given, as in `bench layer`."""
    random = torch.Generator().manual_seed(seed + shape.tokens)
    layers = []
    for each in weights:
        best, indices = torch.randn(shape.tokens, shape.experts, generator=random).topk(shape.top_k, dim=-1)
        layers.append(Layer(each, indices, best.softmax(dim=-1).to(torch.bfloat16)))
    return torch.randn(shape.tokens, shape.d_model, generator=random).to(torch.bfloat16), layers


def reference_decode(tokens: Tensor, layer: Layer) -> Tensor:
    """The truth, `[T, D]` float32: one expert after the other; quantised matrices are taken as what they stand for."""
    result = torch.zeros(tokens.shape, dtype=torch.float32)
    for number in layer.indices.unique().tolist():
        token, choice = (layer.indices == number).nonzero(as_tuple=True)
        gate, linear = F.linear(tokens[token].float(), _expert(layer.weights.w_in, number)).chunk(2, dim=-1)
        answer = F.linear(F.silu(gate) * linear, _expert(layer.weights.w_out, number))
        result.index_add_(0, token, answer * layer.chosen[token, choice, None].float())
    return result


def _expert(matrix: Any, number: int) -> Tensor:
    """One expert's matrix `[out, in]` in float32; of quantised ones what the codes stand for."""
    if isinstance(matrix, Tensor):
        return matrix[number].float()
    codes, scales = matrix.codes[number : number + 1], matrix.scales[number : number + 1]
    one = replace(matrix, codes=codes, scales=scales, shape=torch.Size((1, *matrix.shape[1:])))
    whole: Tensor = one.dequantize(torch.float32)[0]
    return whole


def _work(shape: DecodeShape, layers: Sequence[Layer]) -> Work:
    active = sum(
        (layer.weights.w_in.nbytes + layer.weights.w_out.nbytes) / shape.experts * len(layer.indices.unique())
        for layer in layers
    )
    flops = 2.0 * shape.expert_elements * shape.tokens * shape.top_k * shape.layers
    return Work(flops=flops, bytes=active, tokens=shape.tokens)


def _contestant(
    name: str, role: Any, shape: DecodeShape, inputs: Tensor, layers: list[Layer], one: Any
) -> Contestant:
    def run() -> Outputs:
        with torch.no_grad():
            return {"output": torch.stack([one(layer) for layer in layers])}

    expected = cache(lambda: {"output": torch.stack([reference_decode(inputs, layer) for layer in layers])})
    longest = max(shape.d_model, shape.d_expert)
    tolerance = {"output": rounding(torch.bfloat16, 5 + shape.top_k, longest)}
    return Contestant(name, run, expected, tolerance, _work(shape, layers), role)


def _ours(
    shape: DecodeShape,
    inputs: Tensor,
    layers: list[Layer],
    bits: int,
    packed: dict[int, list[ExpertWeights]],
) -> Contestant:
    if bits < 16:
        layers = [replace(layer, weights=each) for layer, each in zip(layers, packed[bits], strict=True)]
    name = "moekit" if bits == 16 else f"moekit int{bits}"
    # a router's weights are float32 in moekit, and bfloat16 in the models of transformers
    chosen = {id(layer): layer.chosen.float() for layer in layers}
    return _contestant(
        name, "moekit", shape, inputs, layers,
        lambda layer: expert_decode(inputs, layer.indices, chosen[id(layer)], layer.weights),
    )  # fmt: skip


def _theirs(implementation: str, shape: DecodeShape, inputs: Tensor, layers: list[Layer]) -> Contestant:
    functions: dict[int, ExpertFunction] = {
        id(layer): experts_function(layer.weights, implementation, shape.top_k) for layer in layers
    }
    return _contestant(
        f"transformers {implementation}", "peer", shape, inputs, layers,
        lambda layer: functions[id(layer)](inputs, layer.indices, layer.chosen),
    )  # fmt: skip
