"""moekit's expert kernels in Hugging Face transformers: an experts implementation by name.

After `moekit.use_in_transformers()`, any model of transformers whose experts follow its common interface (a class
decorated with `use_experts_implementation`: Mixtral, OLMoE, Qwen2/3-MoE, DeepSeek, GPT-OSS and some fifty others) takes
`experts_implementation="moekit"`, in inference and in training. What the kernels cannot compute goes to transformers'
own grouped product, and a warning says so once.

What stands between an expert's two maps is not read from a model's name: the module's own gate is called on a few
numbers and compared with what moekit's activations make of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import math
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.errors import ConfigError, MissingExtraError, require
from moekit.convert import around_experts
from moekit.kernels.chosen_experts import chosen_experts
from moekit.kernels.expert_weights import GATED, KINDS, Activation, ExpertWeights
from moekit.kernels.quantized import quantize_experts as quantize_weights

NAME = around_experts.NAME
_BEFORE = "_before_moekit"


class MoekitFallbackWarning(UserWarning):
    """A transformers module whose experts moekit's kernels do not compute here; transformers' own path did."""


def use_in_transformers(model: nn.Module | None = None) -> str:
    """Make "moekit" known to transformers, and put a model that is there already on all of its kernels.

    Without a model, `experts_implementation="moekit"` and `attn_implementation="moekit"` become known. With one, its
    experts implementation becomes "moekit", and in inference on a CPU in bfloat16 the rest gets faster: attention where
    the model uses "sdpa", linear maps of few rows, norms, and caches that grow in place. What moekit's kernels cannot
    compute is computed as before, so the model trains as before; `undo(model)` takes everything back. Calling it again
    changes nothing.

    Args:
        model: a model of transformers, or None.

    Returns:
        The name, "moekit".

    Errors: `MissingExtraError` without transformers 5; `ConfigError` for a model that is none of transformers'.

    Example::

        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
        moekit.use_in_transformers(model)

    The experts alone: `AutoModelForCausalLM.from_pretrained(name, experts_implementation="moekit")` after
    `moekit.use_in_transformers()`, or `model.set_experts_implementation("moekit")`.
    """
    _interface().register(NAME, experts_forward)
    around_experts.register()
    if model is None:
        return NAME
    require(
        hasattr(model, "set_experts_implementation") and hasattr(model, "set_attn_implementation"),
        "model",
        type(model).__name__,
        "must be a model of transformers",
        "Give the model that from_pretrained returned",
    )
    foreign: Any = model
    if _BEFORE not in model.__dict__:
        # on the model, so that a copy of it can be taken back as well
        model.__dict__[_BEFORE] = {
            "experts": foreign.get_experts_implementation(),
            "attention": _attention_implementations(model),
        }
    before = model.__dict__[_BEFORE]
    if any(_is_experts(module) for module in model.modules()):
        foreign.set_experts_implementation(NAME)
    foreign.set_attn_implementation({k: NAME if v == "sdpa" else v for k, v in before["attention"].items()})
    around_experts.install(model)
    return NAME


def undo(model: nn.Module) -> None:
    """Take back `use_in_transformers(model)`: the implementations that the model had, and its modules' own forward.

    A model that was not given to `use_in_transformers` stays as it is. Quantised experts stay on "moekit": no other
    implementation reads them.
    """
    around_experts.remove(model)
    before = model.__dict__.pop(_BEFORE, None)
    if before is None:
        return
    foreign: Any = model
    quantised = any(
        known is not None
        and isinstance(known.weights, ExpertWeights)
        and not isinstance(known.weights.w_in, Tensor)
        for known in map(_KNOWN.get, model.modules())
    )
    if not quantised:
        foreign.set_experts_implementation(before["experts"])
    foreign.set_attn_implementation(before["attention"])


def _attention_implementations(model: nn.Module) -> dict[str, str | None]:
    """Of the model and its parts with a configuration of their own, as `set_attn_implementation` takes them."""
    config: Any = model.config
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    own = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **own}


def quantize_experts(model: nn.Module, bits: int = 8, group_size: int = 64) -> int:
    """Replace the experts' weights of a transformers model by 8 or 4 bit ones, for inference on a CPU.

    The float weights are freed; the model's experts implementation becomes "moekit". Group-wise symmetric, see
    `moekit.kernels.quantized`; everything but the experts stays as it is.

    Args:
        model: a model of transformers with at least one experts module; changed in place.
        bits: 8 or 4.
        group_size: 32, 64 or 128 inputs share a scale.

    Returns:
        Bytes of the experts' weights now.

    Errors: `ConfigError` where the model has no such experts, or some whose activation or widths do not fit. Nothing is
    changed then.
    """
    found = [module for module in model.modules() if _is_experts(module)]
    require(
        bool(found),
        "model",
        type(model).__name__,
        "must have experts that follow transformers' common interface",
    )
    use_in_transformers()
    describable = []
    for module in found:
        described = _described(module)
        if isinstance(described, str):
            raise ConfigError(f"{type(module).__name__} cannot be quantised: {described}")
        describable.append((module, described))
    size = 0
    # first all, then the change: an error leaves the model as it was
    quantised = [(module, quantize_weights(weights, bits, group_size)) for module, weights in describable]
    for module, weights in quantised:
        names = _names(module)
        for name in (names.w_in, names.w_out):
            # a place without memory: whoever else reads it gets an error, not old weights
            setattr(module, name, nn.Parameter(getattr(module, name).to("meta"), requires_grad=False))
        _KNOWN[module] = _Known(tuple(_parts(module)), weights)
        size += sum(getattr(weights, name).nbytes for name in ("w_in", "w_out"))
    model.set_experts_implementation(NAME)  # type: ignore[operator]
    return size


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of a transformers module, as its interface wants it.

    Shapes: hidden_states `[T, D]`, top_k_index and top_k_weights `[T, K]`; result `[T, D]` in the type of
    hidden_states. An index of at least the number of experts (expert parallelism) adds nothing.
    """
    device = hidden_states.device.type
    reason = _cannot_serve(device)
    if not reason:
        weights = _described(self)
        reason = weights if isinstance(weights, str) else ""
    if not reason:
        assert isinstance(weights, ExpertWeights)
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        mixed = chosen_experts(hidden_states, top_k_index, top_k_weights, weights, dtype)
        if isinstance(mixed, Tensor):
            return mixed.to(hidden_states.dtype)
        reason = mixed
    return _fall_back(self, reason, hidden_states, top_k_index, top_k_weights)


def _cannot_serve(device: str) -> str:
    if torch.compiler.is_compiling():
        return "torch.compile does not look into moekit's kernels"
    return "" if device == "cpu" else f"moekit's fused experts run on the CPU, not yet on {device}"


def _fall_back(module: nn.Module, reason: str, *arguments: Tensor) -> Tensor:
    known = _KNOWN.get(module)
    if (
        known is not None
        and not isinstance(known.weights, str)
        and not isinstance(known.weights.w_in, Tensor)
    ):
        raise ConfigError(f"quantised experts of {type(module).__name__} cannot be computed: {reason}")
    if not torch.compiler.is_compiling():
        _say_once(type(module).__name__, reason)
    grouped: Tensor = _interface()["grouped_mm"](module, *arguments)
    return grouped


@functools.cache
def _say_once(name: str, reason: str) -> None:
    warnings.warn(
        f"{name}: {reason}; transformers' grouped_mm computes these experts instead",
        MoekitFallbackWarning,
        stacklevel=4,
    )


@functools.cache
def _interface() -> Any:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        try:
            found = f"; found {importlib.metadata.version('transformers')}"
        except importlib.metadata.PackageNotFoundError:
            found = ""
        raise MissingExtraError(
            f"experts implementations need transformers 5 or newer{found}. "
            "Install it: pip install 'moekit[transformers]'"
        ) from None
    return ALL_EXPERTS_FUNCTIONS


# ---------------------------------------------------------------- what a module computes


@dataclass(frozen=True)
class _Names:
    w_in: str
    w_out: str = "down_proj"

    @property
    def parts(self) -> tuple[str, ...]:
        return self.w_in, self.w_out, f"{self.w_in}_bias", f"{self.w_out}_bias"


@dataclass(frozen=True)
class _Known:
    """A module's parameters when it was looked at, and what was seen: weights, or why they do not fit."""

    parts: tuple[Tensor | None, ...]
    weights: ExpertWeights | str


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _names(module: nn.Module) -> _Names:
    return _Names("gate_up_proj" if module.has_gate else "up_proj")


def _parts(module: nn.Module) -> Iterator[Tensor | None]:
    names = _names(module).parts
    for i, name in enumerate(names):
        yield getattr(module, name, None) if i < 2 or module.has_bias else None


def _described(module: nn.Module) -> ExpertWeights | str:
    """The module's experts as moekit's kernels take them, or why they cannot be taken."""
    known = _KNOWN.get(module)
    parts = tuple(_parts(module))
    # a parameter that was replaced (loaded, moved, cast) is another tensor
    if known is None or any(now is not then for now, then in zip(parts, known.parts, strict=True)):
        known = _KNOWN[module] = _Known(parts, _look_at(module, parts))
    return known.weights


def _look_at(module: nn.Module, parts: tuple[Tensor | None, ...]) -> ExpertWeights | str:
    w_in, w_out, b_in, b_out = parts
    # a later transformers gives some experts more than two maps, a gate and biases: has_post_expert_norm, for one
    more = sorted(name for name, value in vars(module).items() if name.startswith("has_") and value is True)
    if unknown := [name for name in more if name not in ("has_gate", "has_bias")]:
        return f"moekit's kernels do not know what {unknown[0]} means"
    if w_in is None or w_out is None or w_in.ndim != 3 or w_out.ndim != 3:
        return f"its weights must be {' and '.join(_names(module).parts[:2])} of three dimensions"
    seen = _activation_of(module)
    if seen is None:
        return "its activation is none of moekit's"
    activation, interleaved = seen
    return ExpertWeights(w_in, w_out, b_in, b_out, activation, bool(module.is_transposed), interleaved)


def _activation_of(module: nn.Module) -> tuple[Activation, bool] | None:
    """The activation that gives what the module's own gate gives, and whether gates and linear parts alternate."""
    limits = _numbers(module, "limit")
    # wide enough to pass every limit, and small values where approximations of gelu differ
    reach = 2 * max([3.0, *limits])
    hidden = torch.linspace(-1, 1, 64).pow(3).mul(reach)
    hidden = torch.stack([hidden, hidden.flip(0), hidden.roll(17), torch.linspace(-3, 3, 64)])
    function: Any = module._apply_gate if module.has_gate else module.act_fn
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected = function(hidden)
    except Exception:  # whatever a foreign gate wants beside its input, it is none of ours
        return None
    for candidate, interleaved in _candidates(module, limits):
        ours = candidate(hidden, interleaved)
        if ours.shape == expected.shape and torch.allclose(ours, expected, rtol=1e-5, atol=1e-6):
            return candidate, interleaved
    return None


def _candidates(module: nn.Module, limits: list[float]) -> Iterator[tuple[Activation, bool]]:
    if not module.has_gate:
        yield from ((Activation(kind), False) for kind in KINDS if kind not in GATED)
        return
    for interleaved in (False, True):
        for kind in ("swiglu", "geglu", "geglu_tanh"):
            yield Activation(kind), interleaved
        choices = itertools.product([1.0, *_numbers(module, "alpha")], [math.inf, *limits], (0.0, 1.0))
        for alpha, limit, offset in choices:
            yield Activation("clamped_swiglu", alpha, limit, offset), interleaved


def _numbers(module: nn.Module, word: str) -> list[float]:
    """Finite numbers among the module's attributes whose names hold `word`."""
    values = (value for name, value in vars(module).items() if word in name)
    return [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
