"""Sinks, windows, parts of heads and latent attention against the formulas written out in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from moekit.config.attention import LatentAttentionConfig, RopeScalingConfig
from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.kernels.attention import attention, attention_with_sinks
from moekit.kernels.registry import available
from moekit.layers.attention import Attention, AttentionMask, attention_mask
from moekit.layers.cache import KVCache
from moekit.layers.latent_attention import LatentAttention
from moekit.layers.rotary import RotaryEmbedding, frequencies

THETA, LENGTH = 100.0, 9


def turned(x: Tensor, width: int, scaling: RopeScalingConfig | None = None) -> Tensor:
    """`[S, N]` with the first `width` of N rotated as complex pairs (x_i, x_{i + width/2})."""
    half = width // 2
    pair = torch.complex(x[:, :half], x[:, half:width])
    angles = torch.arange(len(x)).double()[:, None] * frequencies(width, THETA, scaling)
    size = 1.0 if scaling is None else scaling.rotary_scale
    pair = pair * torch.polar(torch.full_like(angles, size), angles)
    return torch.cat([pair.real, pair.imag, x[:, width:]], dim=-1)


def mixed(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, sink: Tensor | None = None
) -> Tensor:
    """One head, one query at a time: softmax over the allowed keys and, with a sink, one more that says nothing."""
    rows = []
    for i in range(len(q)):
        weights = (k @ q[i] * scale).masked_fill(~allowed[i], -torch.inf).exp()
        total = weights.sum() + (0.0 if sink is None else sink.exp())
        rows.append((weights / total) @ v)
    return torch.stack(rows)


def allowed_by(window: int | None, segments: Tensor | None, length: int = LENGTH) -> Tensor:
    """`[S, S]` written as loops."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            near = window is None or i - j < window
            allowed[i, j] = near and (segments is None or segments[i] == segments[j])
    return allowed


def grouped(layer: Attention, x: Tensor, width: int, allowed: Tensor) -> Tensor:
    """Attention on `[S, D]` in float64."""
    n, g, d = layer.n_heads, layer.n_kv_heads, layer.d_head
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split([n * d, g * d, g * d], dim=-1)
    heads = []
    for h in range(n):
        mine, theirs = slice(h * d, h * d + d), slice(h * g // n * d, h * g // n * d + d)
        sink = None if layer.sinks is None else layer.sinks[h]
        heads.append(
            mixed(
                turned(q[:, mine], width), turned(k[:, theirs], width), v[:, theirs], allowed, d**-0.5, sink
            )
        )
    return torch.cat(heads, dim=-1) @ layer.out.weight.T + layer.out.bias


def randomized(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=0.4)
            if "norm" in name:
                parameter.abs_().add_(0.5)
    return layer


SEGMENTS = torch.tensor([0, 0, 0, 0, 4, 4, 4, 4, 4])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, LENGTH, 50])
@pytest.mark.parametrize("width", [8, 4, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_sinks_windows_and_parts(sinks: bool, window: int | None, width: int, packed: bool) -> None:
    layer = randomized(Attention(12, 4, 2, 8, bias=True, out_bias=True, sinks=sinks, window=window))
    x = torch.randn(2, LENGTH, 12)
    segments = SEGMENTS if packed else None
    mask = AttentionMask(2, LENGTH, 0, x.device, None if segments is None else segments.expand(2, -1))
    rotary = RotaryEmbedding(width, LENGTH, THETA)
    ours = layer(x, rotary(0, LENGTH, x), mask)
    exact = copy.deepcopy(layer).double()
    theirs = torch.stack([grouped(exact, row.double(), width, allowed_by(window, segments)) for row in x])
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    if not packed:  # no mask at all, and one made by hand
        assert torch.equal(layer(x, rotary(0, LENGTH, x)), ours)
        by_hand = allowed_by(None, None).expand(2, 1, -1, -1)
        torch.testing.assert_close(layer(x, rotary(0, LENGTH, x), by_hand), ours)
    # gradients of every parameter, against those of the formulas
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for (name, one), other in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert one.grad is not None
        assert one.grad.any() or window == 1, name  # a single key has all the weight, whatever its score
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_a_sink_by_hand() -> None:
    """Two equal keys and a sink as strong as each: a third of the weight goes nowhere."""
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2)
    v = torch.tensor([[[[3.0], [6.0]]]])
    out = attention_with_sinks(q, k, v, None, torch.zeros(1), 1.0)
    assert out.item() == pytest.approx((3 + 6) / 3)
    out = attention(q, k, v, None, sinks=torch.tensor([math.log(2.0)]), scale=1.0)
    assert out.item() == pytest.approx((3 + 6) / 4)
    # a very large one drowns all else without NaN, a very small one is none
    assert attention_with_sinks(q, k, v, None, torch.tensor([1e4]), 1.0).item() == 0.0
    assert attention_with_sinks(q, k, v, None, torch.tensor([-1e4]), 1.0).item() == pytest.approx(4.5)


def test_values_of_another_width_and_another_scale() -> None:
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 7)
    for scale in (None, 0.3):
        out = attention(q, k, v, None, scale=scale)
        factor = 0.5 if scale is None else scale
        theirs = torch.stack([
            torch.stack([mixed(q[b, h].double(), k[b, h].double(), v[b, h].double(), allowed_by(None, None, 5), factor)
                         for h in range(3)]) for b in range(2)
        ])  # fmt: skip
        torch.testing.assert_close(out.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_mask_of_a_window_by_hand() -> None:
    # three held, two new, each sees three: itself and two before
    assert attention_mask(1, 2, 3, torch.device("cpu"), window=3)[0, 0].tolist() == [
        [False, True, True, True, False],
        [False, False, True, True, True],
    ]
    assert attention_mask(1, 1, 3, torch.device("cpu"), window=4) is None, "it sees all there is"
    assert attention_mask(1, 1, 4, torch.device("cpu"), window=4)[0, 0].tolist() == [
        [False, True, True, True, True]
    ]
    mask = AttentionMask(1, 4, 0, torch.device("cpu"))
    assert mask.dense() is None
    assert mask.dense(2) is mask.dense(2), "made once for all layers with the window"
    assert mask.dense(2)[0, 0].tolist() == allowed_by(2, None, 4).tolist()


# -- with a cache ---------------------------------------------------------------------------------------------------

MODELS = {
    "sinks and windows": {"n_kv_heads": 2, "sliding_window": 3, "attention_sinks": True, "attention_bias": True},
    "window in one layer": {"sliding_window": 2, "sliding_layers": [1], "rotary_share": 0.5},
    "latent": {"latent_attention": {"kv_rank": 6, "d_nope": 4, "d_rope": 2, "d_value": 3}},
    "latent queries": {"latent_attention": {"kv_rank": 6, "q_rank": 5, "d_nope": 4, "d_rope": 4, "d_value": 9},
                       "attention_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 1, 4], [9, 1]])
def test_with_a_cache_as_without(name: str, pieces: list[int]) -> None:
    """The cache of generation, exact sizes; windows reach back into what is held."""
    from moekit.models.language_model import LanguageModel

    config = ModelConfig.from_dict(
        {"vocab_size": 50, "d_model": 16, "n_layers": 2, "d_ff": 24, **MODELS[name]}
    )
    model = randomized(LanguageModel(config)).eval()
    ids = torch.randint(0, 50, (3, 10))
    cache = KVCache.for_config(config, batch=3, max_len=10)
    with torch.no_grad():
        parts = torch.cat([model(part, cache=cache).logits for part in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(parts, model(ids).logits, rtol=1e-4, atol=1e-4)


# -- latent attention -----------------------------------------------------------------------------------------------


def latent_by_formula(
    layer: LatentAttention, x: Tensor, allowed: Tensor, scaling: RopeScalingConfig | None
) -> Tensor:
    """DeepSeek-V2, section 2.1, on `[S, D]` in float64: every head's keys and values from the one latent vector."""
    config = layer.config
    nope, rope, value = config.d_nope, config.d_rope, config.d_value

    def norm(vector: Tensor, weight: Tensor) -> Tensor:
        return vector / (vector.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight

    def bias(linear: nn.Linear) -> Tensor | float:
        return 0.0 if linear.bias is None else linear.bias

    queries = x
    if config.q_rank is not None:
        queries = norm(x @ layer.q_down.weight.T + bias(layer.q_down), layer.q_norm.weight)
    q = queries @ layer.q.weight.T
    down = x @ layer.kv_down.weight.T + bias(layer.kv_down)
    latent, key = norm(down[:, : config.kv_rank], layer.kv_norm.weight), down[:, config.kv_rank :]
    key = turned(key, rope, scaling)
    scale = (nope + rope) ** -0.5 * (1.0 if scaling is None else scaling.score_scale)
    heads = []
    for h in range(layer.n_heads):
        mine = q[:, h * (nope + rope) : (h + 1) * (nope + rope)]
        mine = torch.cat([mine[:, :nope], turned(mine[:, nope:], rope, scaling)], dim=-1)
        both = latent @ layer.kv.weight[h * (nope + value) : (h + 1) * (nope + value)].T
        keys = torch.cat([both[:, :nope], key], dim=-1)
        heads.append(mixed(mine, keys, both[:, nope:], allowed, scale))
    return torch.cat(heads, dim=-1) @ layer.out.weight.T + bias(layer.out)


YARN = RopeScalingConfig(kind="yarn", factor=4.0, original_max_seq_len=16, mscale=0.7, mscale_all_dim=0.9)


@pytest.mark.parametrize("q_rank", [None, 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize(
    "sizes", [(6, 4, 2, 3), (3, 2, 6, 11), (16, 8, 8, 8)]
)  # kv_rank, d_nope, d_rope, d_value
def test_latent_attention(
    q_rank: int | None, bias: bool, scaling: RopeScalingConfig | None, sizes: tuple[int, int, int, int]
) -> None:
    kv_rank, nope, rope, value = sizes
    config = LatentAttentionConfig(kv_rank=kv_rank, q_rank=q_rank, d_nope=nope, d_rope=rope, d_value=value)
    scale = 1.0 if scaling is None else scaling.score_scale
    layer = randomized(LatentAttention(12, 3, config, bias=bias, out_bias=bias, score_scale=scale))
    x = torch.randn(2, LENGTH, 12)
    rotary = RotaryEmbedding(rope, LENGTH, THETA, scaling)
    mask = AttentionMask(2, LENGTH, 0, x.device, SEGMENTS.expand(2, -1))
    exact = copy.deepcopy(layer).double()
    for given, segments in ((None, None), (mask, SEGMENTS)):
        ours = layer(x, rotary(0, LENGTH, x), given)
        allowed = allowed_by(None, segments)
        theirs = torch.stack([latent_by_formula(exact, row.double(), allowed, scaling) for row in x])
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for (name, one), other in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert one.grad is not None
        assert one.grad.any(), name
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-3, atol=1e-5)


def test_the_backbone_hands_the_scale_of_the_scores_on() -> None:
    from moekit.models.language_model import LanguageModel

    config = ModelConfig(latent_attention=LatentAttentionConfig(), rope_scaling=YARN)
    layer = LanguageModel(config).backbone.layers[0].attention
    assert layer.scale == pytest.approx(YARN.score_scale * 48**-0.5)
    plain = LanguageModel(config.replace(rope_scaling=None)).backbone.layers[0].attention
    assert plain.scale == pytest.approx(48**-0.5)


# -- the fused kernel -----------------------------------------------------------------------------------------------

_, FUSED, WHY = available("rotary_attention")[0]


@pytest.mark.skipif(not FUSED, reason=WHY)
@pytest.mark.parametrize(
    ("fields", "width", "length", "fits"),
    [
        ({}, 32, 6, True),
        ({"bias": True, "out_bias": True}, 32, 6, True),
        ({"window": 6}, 32, 6, True),  # it sees all there is
        ({"window": 5}, 32, 6, False),
        ({"sinks": True}, 32, 6, False),
        ({}, 16, 6, False),
        ({"qk_norm": "head"}, 32, 6, False),
        ({"qk_norm": "full"}, 32, 6, False),
    ],
)
def test_the_fused_kernel_is_left_out_where_it_does_not_fit(
    fields: dict, width: int, length: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel knows neither windows nor sinks nor parts of heads; with them the answer would be silently wrong."""
    layer = randomized(Attention(12, 2, 1, 32, **fields)).bfloat16()
    used = []
    real = Attention._fused
    monkeypatch.setattr(Attention, "_fused", lambda *given: used.append(real(*given)) or used[-1])
    x = torch.randn(2, length, 12).bfloat16()
    rotary = RotaryEmbedding(width, length, THETA)
    fast = layer(x, rotary(0, length, x)).detach()
    assert (used[-1] is not None) is fits
    monkeypatch.setattr(Attention, "_fused", lambda *given: None)
    slow = layer(x, rotary(0, length, x)).detach()
    assert float((fast - slow).float().norm() / slow.float().norm()) < 2e-2


# -- settings that do not go together -------------------------------------------------------------------------------

LATENT = {"kv_rank": 8, "d_nope": 4, "d_rope": 2, "d_value": 4}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sliding_layers": [0]}, r"model\.sliding_layers needs sliding_window"),
        (
            {"sliding_window": 4, "sliding_layers": [4]},
            r"model\.sliding_layers must hold numbers of layers in 0\.\.3",
        ),
        ({"sliding_window": 0}, r"model\.sliding_window"),
        (
            {"dense_layers": [9], "moe": {}},
            r"model\.dense_layers must hold numbers of layers in 0\.\.3; got \(9,\)",
        ),
        ({"dense_layers": [0, 1, 2, 3], "moe": {}}, "leaves no sparse layer"),
        ({"rotary_share": 0.3}, r"model\.rotary_share must give an even number of the 64"),
        ({"rotary_share": 0.0}, r"model\.rotary_share"),
        (
            {"latent_attention": LATENT, "sliding_window": 3},
            "sliding_window must be left out with latent_attention",
        ),
        ({"latent_attention": LATENT, "attention_sinks": True}, "attention_sinks must be left out"),
        ({"latent_attention": LATENT, "qk_norm": "head"}, "qk_norm must be left out"),
        ({"latent_attention": LATENT, "n_kv_heads": 2}, "n_kv_heads must be left out"),
        ({"latent_attention": LATENT, "d_head": 8}, "d_head must be left out"),
        ({"latent_attention": LATENT, "rotary_share": 0.5}, "rotary_share must be left out"),
        ({"latent_attention": {**LATENT, "d_rope": 3}}, r"latent_attention\.d_rope must be even"),
        (
            {"moe_by_layer": {0: {}}, "dense_layers": [0], "moe": {}},
            r"moe_by_layer must be the number of a sparse layer",
        ),
    ],
)
def test_settings_that_do_not_go_together(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_dict(fields, "model")


def test_which_layers_are_dense_and_which_have_a_window() -> None:
    config = ModelConfig.from_dict(
        {"n_layers": 8, "n_dense_layers": 1, "moe_every": 2, "dense_layers": [4], "moe": {}, "sliding_window": 5,
         "sliding_layers": [0, 7]}
    )  # fmt: skip
    assert config.moe_layers == (2, 6), "every second after the first, but the fourth"
    assert [config.window_of(layer) for layer in range(8)] == [5, None, None, None, None, None, None, 5]
    assert config.replace(sliding_layers=None).window_of(3) == 5
