"""The key/value cache holds what it is given, in order, and refuses what does not fit."""

from __future__ import annotations

import pytest
import torch

from moekit.config.attention import LatentAttentionConfig
from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.layers.cache import KVCache


def make(**changes) -> KVCache:
    return KVCache(**{"n_layers": 2, "batch": 3, "max_len": 6, "n_kv_heads": 2, "d_head": 4, **changes})


def test_appends_in_order():
    cache = make()
    parts = [torch.randn(3, 2, n, 4) for n in (3, 1, 2)]
    for number, part in enumerate(parts):
        for layer in range(2):
            keys, values = cache.update(layer, part + layer, -part - layer)
            expected = torch.cat(parts[: number + 1], dim=2) + layer
            assert torch.equal(keys, expected)
            assert torch.equal(values, -expected)
        cache.advance(part.shape[2])
        assert cache.length == keys.shape[2]


def test_layers_see_the_same_length_until_advance():
    cache = make()
    for layer in range(2):
        keys, _ = cache.update(layer, torch.ones(3, 2, 2, 4), torch.ones(3, 2, 2, 4))
        assert keys.shape[2] == 2
    assert cache.length == 0


def test_clear_and_keep_rows():
    cache = make()
    part = torch.randn(3, 2, 2, 4)
    cache.update(1, part, 2 * part)
    cache.advance(2)
    cache.keep_rows(torch.tensor([2, 0]))
    assert cache.batch == 2
    new = torch.randn(2, 2, 1, 4)
    keys, values = cache.update(1, new, new)
    assert torch.equal(keys, torch.cat([part[[2, 0]], new], dim=2))
    assert torch.equal(values, torch.cat([2 * part[[2, 0]], new], dim=2))
    cache.clear()
    assert torch.equal(cache.update(1, new, new)[0], new)


def test_keeps_its_type():
    cache = make(dtype=torch.bfloat16)
    keys, _ = cache.update(0, torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 4))
    assert keys.dtype == torch.bfloat16
    assert (
        cache.n_bytes == 2 * 2 * 3 * 2 * 6 * 4 * 2
    )  # keys and values, layers, rows, heads, tokens, width, bytes


def test_takes_sizes_from_a_config():
    config = ModelConfig(d_model=32, n_heads=4, n_kv_heads=2, n_layers=3)
    cache = KVCache.for_config(config, batch=1, max_len=5)
    keys, _ = cache.update(2, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    assert keys.shape == (1, 2, 1, 8)
    assert cache.max_len == 5


def test_errors():
    cache = make()
    full = torch.zeros(3, 2, 6, 4)
    cache.update(0, full, full)
    cache.advance(6)
    one = torch.zeros(3, 2, 1, 4)
    with pytest.raises(
        ConfigError, match=r"cache\.max_len must be at least 7 for 6 held and 1 new tokens; got 6"
    ):
        cache.update(0, one, one)
    cache.clear()
    with pytest.raises(ConfigError, match=r"layer must be in 0\.\.1"):
        cache.update(2, one, one)
    with pytest.raises(ConfigError, match=r"must both have the shape \(3, 2, 1, 4\)"):
        cache.update(0, one[:2], one[:2])
    with pytest.raises(ConfigError, match="must both have the shape"):
        cache.update(0, one, full)
    with pytest.raises(ConfigError, match=r"cache\.max_len must be at least 1; got 0"):
        make(max_len=0)


def test_values_of_another_width():
    cache = make(d_value=3)
    keys, values = torch.randn(3, 2, 2, 4), torch.randn(3, 2, 2, 3)
    held = cache.update(1, keys, values)
    assert torch.equal(held[0], keys)
    assert torch.equal(held[1], values)
    cache.advance(2)
    assert cache.n_bytes == 2 * 3 * 2 * 6 * (4 + 3) * 4
    cache.keep_rows(torch.tensor([1]))
    held = cache.update(1, keys[:1], values[:1])
    assert torch.equal(held[1], torch.cat([values[1:2], values[:1]], dim=2))
    with pytest.raises(ConfigError, match=r"must have the shapes \(\(1, 2, 2, 4\), \(1, 2, 2, 3\)\)"):
        cache.update(1, keys[:1], keys[:1])
    with pytest.raises(ConfigError, match=r"cache\.d_value must be at least 1"):
        make(d_value=0)


def test_latent_attention_holds_one_vector_and_one_key():
    """As few numbers whatever the heads: the point of it."""
    latent = LatentAttentionConfig(kv_rank=8, d_nope=4, d_rope=2, d_value=6)
    small, large = (
        KVCache.for_config(ModelConfig(d_model=32, n_heads=heads, n_layers=3, latent_attention=latent), 2, 5)
        for heads in (1, 16)
    )
    assert small.n_bytes == large.n_bytes == 3 * 2 * 5 * (8 + 2) * 4
    vectors, keys = large.update(0, torch.ones(2, 1, 1, 8), torch.ones(2, 1, 1, 2))
    assert (vectors.shape, keys.shape) == ((2, 1, 1, 8), (2, 1, 1, 2))
