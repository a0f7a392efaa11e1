"""The balancing losses of `moekit.layers.balancing`, in `keras.ops`. Unweighted; the layer knows the coefficients.

Shapes: T tokens, E experts. Padding, False in a mask `[T]`, counts nowhere.
"""

from __future__ import annotations

from typing import Any

from keras import ops


def load_balance_loss(probs: Any, counts: Any, mask: Any = None) -> Any:
    """E * sum(f * P), f the share of the choices and P the mean probability of each expert: 1 at perfect balance.

    Fedus et al. 2021 (arXiv 2101.03961), eq. 4, with f summing to 1. Shapes: probs `[T, E]`, counts `[E]`.

    >>> loss = load_balance_loss(ops.convert_to_tensor([[0.9, 0.1]] * 4), ops.convert_to_tensor([4, 0]))
    >>> round(float(loss), 4)    # 2 * (1 * 0.9)
    1.8
    """
    counts = ops.cast(counts, probs.dtype)
    share = ops.stop_gradient(counts / ops.maximum(ops.sum(counts), 1.0))
    return probs.shape[-1] * ops.sum(share * _mean_over_tokens(probs, mask))


def router_z_loss(logits: Any, mask: Any = None) -> Any:
    """Mean squared log-sum-exp of the logits `[T, E]` (ST-MoE, Zoph et al. 2022, eq. 5).

    >>> import math
    >>> round(float(router_z_loss(ops.zeros((3, 4)))), 6) == round(math.log(4) ** 2, 6)
    True
    """
    return _mean_over_tokens(ops.square(ops.logsumexp(logits, axis=-1)), mask)


def max_violation(tokens_per_expert: Any) -> Any:
    """(largest load - mean load) / mean load, of choices `[E]`: 0 at perfect balance, E - 1 where one takes all.

    >>> float(max_violation(ops.convert_to_tensor([6, 2, 0, 0])))    # (6 - 2) / 2
    2.0
    """
    load = ops.cast(tokens_per_expert, "float32")
    mean = ops.mean(load)
    return (ops.max(load) - mean) / ops.maximum(mean, 1e-10)


def _mean_over_tokens(values: Any, mask: Any) -> Any:
    """Mean of `[T, ...]` over the tokens that count; 0 where none does."""
    if mask is None:
        return ops.sum(values, axis=0) / ops.cast(ops.maximum(ops.shape(values)[0], 1), values.dtype)
    counted = ops.cast(mask, values.dtype)
    weighted = values * ops.reshape(counted, (-1, *[1] * (len(values.shape) - 1)))
    return ops.sum(weighted, axis=0) / ops.maximum(ops.sum(counted), 1.0)
