"""Keys and values of the tokens that a decoder has read, so that each new token costs one position."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.config.errors import ConfigError, require
from moekit.config.model import ModelConfig


class KVCache:
    """Keys and values of up to `max_len` tokens in each layer, `[batch, n_kv_heads, max_len, d_head]`.

    Values may have another width, `d_value`: latent attention keeps its one vector as keys, its rotary key as values.

    The attention of each layer calls `update` with its new keys (already rotated) and values, and the model
    calls `advance` once when all layers have done so; `length` counts the tokens that every layer holds.

    Errors: `ConfigError` where a token too many, a layer out of range or another shape comes in.

    >>> import torch
    >>> cache = KVCache(n_layers=1, batch=2, max_len=4, n_kv_heads=1, d_head=3)
    >>> keys, values = cache.update(0, torch.ones(2, 1, 3, 3), torch.ones(2, 1, 3, 3))
    >>> cache.advance(3)
    >>> keys, values = cache.update(0, torch.zeros(2, 1, 1, 3), torch.zeros(2, 1, 1, 3))
    >>> cache.advance(1)
    >>> cache.length, keys.shape, keys[0, 0, :, 0].tolist()
    (4, torch.Size([2, 1, 4, 3]), [1.0, 1.0, 1.0, 0.0])
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        max_len: int,
        n_kv_heads: int,
        d_head: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        d_value: int | None = None,
    ) -> None:
        sizes = {
            "n_layers": n_layers,
            "batch": batch,
            "max_len": max_len,
            "n_kv_heads": n_kv_heads,
            "d_head": d_head,
            "d_value": d_head if d_value is None else d_value,
        }
        for name, size in sizes.items():
            require(size >= 1, f"cache.{name}", size, "must be at least 1")
        shape = (n_layers, batch, n_kv_heads, max_len)
        self._keys = torch.zeros(*shape, d_head, dtype=dtype, device=device)
        self._values = torch.zeros(*shape, sizes["d_value"], dtype=dtype, device=device)
        self.length = 0

    @classmethod
    def for_config(
        cls,
        config: ModelConfig,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A cache with the sizes of a decoder; for latent attention the latent vectors and rotary keys."""
        latent = config.latent_attention
        if latent is not None:
            return cls(config.n_layers, batch, max_len, 1, latent.kv_rank, dtype, device, latent.d_rope)
        return cls(config.n_layers, batch, max_len, config.kv_heads, config.head_width, dtype, device)

    @property
    def batch(self) -> int:
        return self._keys.shape[1]

    @property
    def max_len(self) -> int:
        """Tokens that fit."""
        return self._keys.shape[3]

    @property
    def n_bytes(self) -> int:
        """Memory taken, whether filled or not."""
        return self._keys.nbytes + self._values.nbytes

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, Hkv, S, Dh]` of a layer.

        Returns views `[B, Hkv, length + S, Dh]` of all that the layer holds.
        """
        n_layers, batch, n_kv_heads, max_len, d_head = self._keys.shape
        d_value = self._values.shape[-1]
        require(
            0 <= layer < n_layers, "layer", layer, f"must be in 0..{n_layers - 1}, the layers of the cache"
        )
        new = keys.shape[2]
        expected = (batch, n_kv_heads, new, d_head), (batch, n_kv_heads, new, d_value)
        got = (tuple(keys.shape), tuple(values.shape))
        rule = (
            f"must both have the shape {expected[0]}"
            if d_head == d_value
            else f"must have the shapes {expected}"
        )
        require(got == expected, "keys and values", got, rule)
        end = self.length + new
        if end > max_len:
            raise ConfigError(
                f"cache.max_len must be at least {end} for {self.length} held and {new} new tokens; "
                f"got {max_len}. Make a longer cache"
            )
        self._keys[layer, :, :, self.length : end] = keys
        self._values[layer, :, :, self.length : end] = values
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` as held, once all layers have appended theirs."""
        self.length += n_tokens

    def clear(self) -> None:
        """Forget all tokens and keep the room."""
        self.length = 0

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all sequences of the batch but `rows` (long, `[n]`), in that order."""
        self._keys = self._keys.index_select(1, rows.to(self._keys.device))
        self._values = self._values.index_select(1, rows.to(self._values.device))
