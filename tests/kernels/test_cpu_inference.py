"""Attention over a cache, linear maps of few rows and norms against float64, in odd shapes and strides."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_kernel_helpers import close, needs
from torch import Tensor

from moekit.config.errors import ConfigError
from moekit.kernels.cpu import cached_attention as attention
from moekit.kernels.cpu import linear, norm
from moekit.kernels.registry import available

needs_attention, needs_linear, needs_norm = (
    needs("cached_attention"),
    needs("linear_decode"),
    needs("rms_norm"),
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def truth(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None = None) -> Tensor:
    """`[B, Q, H, M]` in float64; zeros where nothing is seen."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    seen = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & mask
    probs = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
    return (probs @ v).transpose(1, 2)


def parts(b: int, h: int, g: int, n_q: int, n_k: int, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as a projection gives them, keys within a larger room (a cache), values in rows further apart."""
    q = torch.randn(b, n_q, h, n).bfloat16().transpose(1, 2)
    k = torch.randn(b, g, n_k + 9, n).bfloat16()[:, :, 2 : n_k + 2]
    v = torch.randn(b, n_k, g, m + 32).bfloat16().transpose(1, 2)[..., 32:]
    return q, k, v


SHAPES = [
    # B, H, G, Q, K, N, M, causal
    (1, 1, 1, 1, 1, 32, 32, False),
    (2, 8, 2, 1, 300, 64, 96, False),
    (1, 4, 4, 1, 1025, 128, 128, False),
    (2, 4, 1, 5, 5, 128, 64, True),
    (1, 20, 1, 2, 257, 32, 32, False),
    (1, 4, 2, 16, 700, 192, 128, False),
    (1, 4, 2, 16, 16, 64, 64, True),
    (1, 4, 2, 17, 17, 64, 64, True),
    (2, 4, 2, 129, 129, 128, 64, True),
    (1, 3, 3, 100, 77, 32, 32, False),
    (1, 2, 1, 64, 64, 96, 96, True),
    (1, 2, 2, 40, 90, 96, 96, True),
    (1, 2, 1, 90, 40, 64, 32, True),
    (3, 2, 1, 200, 200, 32, 64, True),
]


@needs_attention
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_near_float64(shape, threads) -> None:
    *sizes, causal = shape
    q, k, v = parts(*sizes)
    scale = 1.7 * sizes[5] ** -0.5
    out = attention.cached_attention(q, k, v, causal, scale)
    close(out, truth(q, k, v, causal, scale), str(shape))
    for n in (1, 3):
        threads(n)
        assert attention.cached_attention(q, k, v, causal, scale).equal(out)


@needs_attention
@pytest.mark.parametrize("mask_shape", [(2, 1), (1, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 300), (7, 33)])
def test_a_mask_hides_keys_and_a_query_that_sees_none_gets_zeros(n_q, n_k, mask_shape) -> None:
    q, k, v = parts(2, 4, 2, n_q, n_k, 32, 64)
    mask = torch.rand(*mask_shape, n_q, n_k) > 0.5
    mask[..., -1, :] = False
    mask[:, :, :, :20] = False  # the beginning, as padding is
    mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    out = attention.cached_attention(q, k, v, False, 0.3, mask)
    close(out, truth(q, k, v, False, 0.3, mask), "masked")
    assert out[:, -1].abs().sum() == 0
    full = torch.ones(2, 1, n_q, n_k, dtype=torch.bool)
    assert attention.cached_attention(q, k, v, False, 0.3, full).equal(
        attention.cached_attention(q, k, v, False, 0.3)
    )


@needs_attention
def test_a_large_maximum_in_a_late_block_does_not_overflow() -> None:
    for n_q in (1, 70):
        q, k, v = parts(1, 1, 1, n_q, 600, 32, 32)
        k[:, :, 500] *= 100
        k[:, :, 10] *= 30
        close(attention.cached_attention(q, k, v, False, 1.0), truth(q, k, v, False, 1.0), f"{n_q} queries")


@needs_attention
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [4, 80])
def test_nan_and_infinity_come_through_where_they_are_seen_and_nowhere_else(n, bad) -> None:
    for part in range(3):
        tensors = parts(1, 2, 2, n, n, 32, 32)
        clean = attention.cached_attention(*tensors, True, 0.2)
        tensors[part][0, 1, 3] = bad
        out = attention.cached_attention(*tensors, True, 0.2)
        touched = [3] if part == 0 else list(range(3, n))
        assert not out[0, touched, 1].isfinite().all(-1).any()
        assert out[0, :, 0].equal(clean[0, :, 0])
        # a value that is not seen has a probability of zero, which an infinity does not survive (nor does it in torch)
        rest = [] if part == 2 else [i for i in range(n) if i not in touched]
        assert out[0, rest, 1].equal(clean[0, rest, 1])


@needs_attention
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q.float(), k, v), "must be bfloat16 on the CPU; got torch.float32"),
        (lambda q, k, v: (q, k[..., :16], v), r"keys and values must be \[1, G, K, 32\]"),
        (lambda q, k, v: (q[..., :16], k[..., :16], v), "multiples of 32; got 16 and 32"),
        (lambda q, k, v: (q[:, :3], k, v), r"multiple of the key heads \(2\); got 3"),
        (lambda q, k, v: (q.mT.contiguous().mT, k, v), "got a stride of 5"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "there must be"),
        (lambda q, k, v: (q[0], k, v), "four dimensions"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "requires_grad must be False; got True. Call it under"),
    ],
)
def test_attention_refuses_what_it_cannot_compute(change, words) -> None:
    q, k, v = change(*(torch.randn(1, heads, 5, 32).bfloat16() for heads in (4, 2, 2)))
    with pytest.raises(ConfigError, match=words):
        attention.cached_attention(q, k, v, True, 1.0)


@needs_attention
def test_masks_that_do_not_fit_and_bad_scales_are_refused() -> None:
    x = torch.randn(2, 1, 3, 32).bfloat16()
    for mask, words in (
        (torch.zeros(2, 1, 3, 3), "a mask must be bool"),
        (torch.ones(3, 1, 3, 3).bool(), r"a mask must be \[2, 1, 3, 3\]"),
        (torch.ones(1, 1, 1, 3).bool(), "must have 3 queries and 3 keys"),
    ):
        assert words.replace("\\", "") in attention.fits(x, x, x, mask)
    many = torch.randn(1, 1, 17, 32).bfloat16()
    assert "at most 16 queries; got 17" in attention.fits(many, many, many, torch.ones(1, 1, 17, 17).bool())
    with pytest.raises(ConfigError, match=r"scale must be positive; got -1\.0"):
        attention.cached_attention(x, x, x, True, -1.0)


# ---------------------------------------------------------------- linear maps


@needs_linear
@pytest.mark.parametrize("rows", [(1,), (2, 1), (3,), (4,), (5,), (2, 4), (0,)])
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 32), (17, 96), (64, 32), (1000, 160), (15, 32 * 1100)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_near_float64(with_bias, n_out, n_in, rows, threads) -> None:
    x, weight = torch.randn(*rows, n_in).bfloat16(), torch.randn(n_out, n_in).bfloat16()
    bias = (10 * torch.randn(n_out)).bfloat16() if with_bias else None
    y = linear.linear_decode(x, weight, bias)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    close(y, exact, "linear")
    for n in (1, 3):
        threads(n)
        assert linear.linear_decode(x, weight, bias).equal(y)


@needs_linear
def test_linear_writes_nothing_behind_its_rows_and_keeps_nan_to_itself() -> None:
    x, weight = torch.randn(3, 32).bfloat16(), torch.randn(21, 32).bfloat16()
    clean = linear.linear_decode(x, weight)
    x[1, 5], weight[20, 0] = math.nan, math.inf
    y = linear.linear_decode(x, weight)
    assert y[1].isnan().all()
    assert not y[:, 20].isfinite().any()
    assert y[::2, :20].equal(clean[::2, :20])


@needs_linear
def test_linear_refuses_what_it_cannot_compute() -> None:
    weight = torch.randn(4, 32).bfloat16()
    for x in (torch.randn(1, 32), torch.randn(1, 64).bfloat16()):
        with pytest.raises(ConfigError, match=r"x must be bfloat16 \[\.\.\., 32\] on the CPU"):
            linear.linear_decode(x, weight)
    for bad, bias, words in (
        (weight.float(), None, "the weight must be contiguous bfloat16"),
        (torch.randn(32, 64).bfloat16().T, None, "the weight must be contiguous"),
        (weight, torch.zeros(3).bfloat16(), r"the bias must be \[4\]; got \[3\]"),
        (weight, torch.zeros(4), "the bias must be contiguous bfloat16"),
    ):
        with pytest.raises(ConfigError, match=words):
            linear.linear_decode(torch.randn(1, bad.shape[1]).bfloat16(), bad, bias)


# ---------------------------------------------------------------- norms


@needs_norm
@pytest.mark.parametrize("rows", [(1,), (3, 7), (600,), (0,)])
@pytest.mark.parametrize("width", [16, 48, 2048])
@pytest.mark.parametrize(("offset", "early"), [(0.0, True), (0.0, False), (1.0, False)])
def test_norm_is_near_float64(offset, early, width, rows) -> None:
    x, weight = (3 * torch.randn(*rows, width)).bfloat16(), torch.randn(width).bfloat16()
    exact = (
        x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (offset + weight.double())
    )
    close(norm.rms_norm_cpu(x, weight, 1e-3, offset, early), exact, "norm")
    close(norm.rms_norm_cpu(x, weight.float(), 1e-3, offset, early), exact, "norm with a float32 weight")
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    y = norm.rms_norm_cpu(x, weight, 1e-3, offset, early)
    assert norm.rms_norm_cpu(strided, weight, 1e-3, offset, early).equal(y)


@needs_norm
def test_norm_of_zeros_and_nan() -> None:
    x = torch.zeros(3, 32).bfloat16()
    x[1, 4] = math.nan
    y = norm.rms_norm_cpu(x, torch.ones(32), 1e-6)
    assert y[0].abs().sum() == 0
    assert y[1].isnan().all()
    with pytest.raises(ConfigError, match="the width must be a multiple of 16; got 8"):
        norm.rms_norm_cpu(x[:, :8], torch.ones(8), 1e-6)


def test_the_switch_names_itself(monkeypatch) -> None:
    monkeypatch.setenv("MOEKIT_CPU_KERNELS", "0")
    for op in ("cached_attention", "linear_decode", "rms_norm"):
        _, can_run, why = available(op)[0]
        assert not can_run
        assert "MOEKIT_CPU_KERNELS=0" in why
        assert not available(op, "cuda")[0][1]
        assert not available(op, "cpu", torch.float32)[0][1]
