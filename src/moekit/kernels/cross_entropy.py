"""Cross-entropy of a linear map over the vocabulary without keeping the logits of all positions.

The plain way writes `[N, V]` logits three times over (logits, log-probabilities, gradient), which for a small
model costs more than its matrix products. Here the positions go in blocks that fit the cache, and each
block's gradient is formed while its logits are still there (the idea of the Liger kernel, Hsu et al. 2024,
arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.kernels.registry import find

IGNORED = -100


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The truth, in float32: see `linear_cross_entropy`."""
    losses = F.cross_entropy(
        hidden.float() @ weight.float().t(), targets, reduction="none", ignore_index=IGNORED
    )
    return losses.sum() / (targets != IGNORED).sum().clamp(min=1), losses


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, block: int = 256
) -> tuple[Tensor, Tensor]:
    """Mean and per-position cross-entropy of `hidden @ weight.T` in nats.

    Shapes: hidden `[N, D]`, weight `[V, D]`, targets `[N]` (-100 is ignored). Returns the mean over the
    targets that count (0 where none does) and the losses `[N]` float32, 0 where ignored; only the mean
    carries a gradient. Under autocast the products run in the autocast type; log-sum-exp and sums are
    float32.

    >>> import torch
    >>> mean, each = linear_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, -100]))
    >>> round(mean.item(), 4), [round(x, 4) for x in each.tolist()]    # log(5), and 0 for the ignored one
    (1.6094, [1.6094, 1.6094, 0.0])
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    kernel = None if torch.compiler.is_compiling() else find("linear_cross_entropy", device, dtype)
    if kernel is not None and not kernel.fits(hidden.shape[-1]):
        fused: tuple[Tensor, Tensor] = kernel.function(hidden, weight, targets, IGNORED)
        return fused
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden.to(dtype), weight.to(dtype), targets, block, torch.is_grad_enabled()
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, block: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        counted = targets != IGNORED
        n_counted = counted.sum().clamp(min=1)
        # only the ignored ones become a valid label: another negative target must fail in gather
        labels_of = targets.masked_fill(~counted, 0)
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        # needs_input_grad is True for a parameter under no_grad as well
        wants_hidden, wants_weight = (with_gradient and wanted for wanted in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        )
        for start in range(0, hidden.shape[0], block):
            part = slice(start, start + block)
            rows, labels, keep = hidden[part], labels_of[part, None], counted[part]
            logits = (rows @ weight.t()).float()
            picked = logits.gather(1, labels)
            top = logits.amax(dim=1, keepdim=True)
            probs = logits.sub_(top).exp_()
            total = probs.sum(dim=1, keepdim=True)
            losses[part] = torch.where(keep, (total.log() + top - picked)[:, 0], 0.0)
            if not (wants_hidden or wants_weight):
                continue
            # d loss / d logits = probs - onehot, over the number of counted targets
            scale = (keep / n_counted)[:, None]
            probs.mul_(scale / total).scatter_add_(1, labels, -scale)
            grad_logits = probs.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ rows
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum() / n_counted, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_hidden * scale.to(grad_hidden.dtype) if grad_hidden is not None else None,
            grad_weight * scale.to(grad_weight.dtype) if grad_weight is not None else None,
            None,
            None,
            None,
        )
