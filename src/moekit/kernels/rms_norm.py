"""Root-mean-square normalisation with few passes over memory.

On the CPU `torch.nn.functional.rms_norm` runs as separate operations forward and backward, about eight times
as slow as its fused `layer_norm`. The backward formulas below are worked out by hand for y = x * r * w, r =
(mean(x^2) + eps)^-1/2: dx = r * (g*w - xhat * mean(g*w*xhat)), dw = sum over rows of g * xhat, with xhat = x
* r.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.kernels.registry import find


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The truth: x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps).to(x.dtype) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference` in the type of `x`, by the fastest way for its device."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, for_products: bool = False
) -> tuple[Tensor, Tensor]:
    """The residual sum x + delta (x where delta is None) in the type of `x`, and its norm.

    The norm has the type of `x` or, with `for_products` under autocast, the one that products run in: the cast that
    they would begin with comes with the same pass over memory.
    """
    device = x.device.type
    products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    wanted = products if for_products else x.dtype
    kernel = None if torch.compiler.is_compiling() else find("add_rms_norm", device, products)
    if kernel is not None and x.dtype == torch.float32 and not kernel.fits(x.shape[-1]):
        fused: tuple[Tensor, Tensor] = kernel.function(x, delta, weight, eps, wanted)
        return fused
    total = x if delta is None else (x + delta).to(x.dtype)
    return total, rms_norm(total, weight, eps).to(wanted)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        # a sum of squares as a product of each row with itself: one fused pass
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(width)
        inverse = mean_square.add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, inverse, weight = ctx.saved_tensors
        grad = grads[0]
        product = grad * normed
        grad_weight = product.reshape(-1, product.shape[-1]).sum(dim=0)
        # mean over the width of g * w * xhat, as one matrix-vector product
        mean = (product @ weight).unsqueeze(-1).div_(-weight.shape[0])
        grad_x = (grad * weight).addcmul_(normed, mean).mul_(inverse)
        return grad_x, grad_weight, None
