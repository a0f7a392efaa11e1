"""What stands around the experts of a transformers model, faster in inference on a CPU.

Attention is a function that transformers knows by name (`register`). `install` replaces the `forward` of single
modules: of every `nn.Linear`, and of the norms that compute what moekit's kernel computes. Classes, parameters and
hooks stay as they are, and each replaced forward goes to the class's own where moekit's kernel does not apply: another
type or device, a gradient, autocast, torch.compile. So nothing has to be undone before training.

Shape legend: B batch, H query heads, G key/value heads, Q queries, K keys, N head width, D width.
"""

from __future__ import annotations

import copy
import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.kernels.cpu.linear import FEW_ROWS
from moekit.kernels.registry import find

NAME = "moekit"


def register() -> None:
    """Make `attn_implementation="moekit"` known to transformers, with the masks of "sdpa"."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def install(model: nn.Module) -> None:
    """Replace the forward of the model's linear maps and norms, and let its caches grow in place; see `remove`."""
    for module in model.modules():
        if "forward" in module.__dict__:  # ours already, or somebody else's that may do more than the class's
            continue
        if type(module) is nn.Linear:
            # a partial, not a method: it is copied and pickled with the module that it belongs to
            module.forward = functools.partial(linear_forward, module)  # type: ignore[method-assign]
        elif type(module).__name__.endswith("RMSNorm") and isinstance(
            getattr(module, "weight", None), nn.Parameter
        ):
            module.forward = functools.partial(norm_forward, module)
    if let_cache_grow not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(let_cache_grow, with_kwargs=True)


def remove(model: nn.Module) -> None:
    """Undo `install`, on a copy of the model as well."""
    for module in model.modules():
        own = module.__dict__.get("forward")
        if isinstance(own, functools.partial) and own.func in (linear_forward, norm_forward):
            del module.__dict__["forward"]
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is let_cache_grow:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel without gradients may take these: inference, eagerly, with torch's own kinds of tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (Tensor, nn.Parameter) or (grad and tensor.requires_grad)
        ):
            return False
    return True


# ---------------------------------------------------------------- attention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: what "sdpa" answers, by moekit's kernel where that applies.

    Shapes: query `[B, H, Q, N]`, key and value `[B, G, K, N]`, mask `[B or 1, H or 1, Q, K]` or None; result
    `[B, Q, H, N]` and None. A sliding window is in the mask, as with "sdpa".
    """
    kernel = None
    if (
        dropout == 0
        and _plain(query, key, value, attention_mask)
        and not any(extra.get(name) is not None for name in ("position_bias", "s_aux", "softcap"))
        and not extra.get("output_attentions")
        and (scaling is None or scaling > 0)
    ):
        kernel = find("cached_attention", query.device.type, query.dtype)
    if kernel is None or kernel.fits(query, key, value, attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        answer: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **extra
        )
        return answer
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # without a mask one query sees everything, and more than one are the first of the sequence
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return kernel.function(query, key, value, causal, scale, attention_mask), None


# ---------------------------------------------------------------- linear maps


def linear_forward(module: nn.Linear, input: Tensor) -> Tensor:
    """`nn.Linear.forward`; few rows by moekit's kernel where that applies. Shapes: `[..., D]` to `[..., O]`."""
    weight, bias = module.weight, module.bias
    if (
        input.dtype is torch.bfloat16
        and 0 < input.numel() <= FEW_ROWS * weight.shape[-1]
        and input.shape[-1] == weight.shape[-1]
        and _plain(input, weight, bias)
        and not torch.is_autocast_enabled("cpu")
    ):
        kernel = find("linear_decode", input.device.type, torch.bfloat16)
        if kernel is not None and not kernel.fits(weight, bias):
            y: Tensor = kernel.function(input, weight, bias)
            return y
    return nn.functional.linear(input, weight, bias)


# ---------------------------------------------------------------- norms


@dataclass(frozen=True)
class _Norm:
    eps: float
    offset: float
    early: bool

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        if self.early:
            return weight * normed.to(x.dtype)
        return ((self.offset + weight.float()) * normed).to(x.dtype)


_NORMS: weakref.WeakKeyDictionary[nn.Module, _Norm | None] = weakref.WeakKeyDictionary()


def norm_forward(module: nn.Module, *arguments: Any, **named: Any) -> Any:
    """The forward of a norm; by moekit's kernel where that computes the same. Shapes: `[..., D]` to the same."""
    if len(arguments) == 1 and not named:
        x, weight = arguments[0], module.weight
        if isinstance(x, Tensor) and isinstance(weight, Tensor) and _plain(x, weight):
            kernel = find("rms_norm", x.device.type, x.dtype)
            if kernel is not None and not kernel.fits(x, weight):
                if module not in _NORMS:
                    _NORMS[module] = _seen(module)
                how = _NORMS[module]
                # rounded early, a float32 weight gives a float32 result
                if how is not None and not (how.early and weight.dtype is not torch.bfloat16):
                    return kernel.function(x, weight, how.eps, how.offset, how.early)
    return type(module).forward(module, *arguments, **named)


def _seen(module: nn.Module) -> _Norm | None:
    """What the module computes, found by calling it with random numbers and a random weight; None for another norm."""
    probe = copy.copy(module)
    probe.__dict__.pop("forward", None)
    if set(module._parameters) != {"weight"} or module._modules or module._buffers:
        return None
    width = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    random = torch.Generator().manual_seed(0)
    # rows around the square root of a usual eps, so that another one shows
    x = torch.randn(4, width, generator=random) * torch.tensor([[30.0], [1.0], [1e-2], [1e-3]])
    weight = torch.randn(width, generator=random).bfloat16()
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    x = x.bfloat16()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected = type(module).forward(probe, x)
    except Exception:  # whatever a foreign norm wants beside its input, it is none of ours
        return None
    for eps in (value for value in vars(module).values() if isinstance(value, float)):
        for how in (_Norm(eps, 0.0, True), _Norm(eps, 0.0, False), _Norm(eps, 1.0, False)):
            if torch.equal(how.plain(x, weight), expected):
                return how
    return None


# ---------------------------------------------------------------- caches


def let_cache_grow(model: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
    """A hook before the model's forward: layers of a `DynamicCache` get room for more tokens than they hold."""
    cache = named.get("past_key_values")
    if cache is None or torch.compiler.is_compiling():
        return
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return
    growing = _growing_layer()
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = growing
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = growing


def __getattr__(name: str) -> Any:
    if name == "GrowingLayer":  # for pickle, which looks for a class where it says it was made
        return _growing_layer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _growing_layer() -> type:
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """A `DynamicLayer` that appends in place instead of copying all keys and values for every token.

        Whatever was handed out keeps its content: after a crop the next token goes to new memory.
        """

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            rooms = self.__dict__.setdefault("rooms", {})
            self.keys = _appended(rooms, "keys", self.keys, key_states)  # type: ignore[arg-type]
            self.values = _appended(rooms, "values", self.values, value_states)  # type: ignore[arg-type]
            return self.keys, self.values

    GrowingLayer.__qualname__ = "GrowingLayer"
    GrowingLayer.__module__ = __name__
    return GrowingLayer


def _appended(rooms: dict[str, tuple[Tensor, int]], name: str, old: Tensor, new: Tensor) -> Tensor:
    """old `[B, G, K, N]` (or empty) and new `[B, G, Q, N]` one behind the other, in the room of that name."""
    wants_grad = torch.is_grad_enabled() and (old.requires_grad or new.requires_grad)
    if wants_grad or new.ndim != 4 or not _plain(old, new) or old.dtype is not new.dtype:
        rooms.pop(name, None)
        return torch.cat([old, new], dim=-2)
    batch, groups, more, width = new.shape
    length = old.shape[2] if old.numel() else 0
    room, written = rooms.get(name, (None, 0))
    if (
        room is None
        or written != length
        or length + more > room.shape[2]
        or old.data_ptr() != room.data_ptr()
        or old.shape != (batch, groups, length, width)
        or old.stride() != room.stride()
        or (room.is_inference() and not torch.is_inference_mode_enabled())
    ):
        capacity = length + more + max(64, (length + more) // 8)
        room = new.new_empty(batch, groups, capacity, width)
        if length:
            room[:, :, :length] = old
    room[:, :, length : length + more] = new
    rooms[name] = room, length + more
    return room[:, :, : length + more]
