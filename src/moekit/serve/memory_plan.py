"""What of a decoder fits a given memory: its precision, and how many experts stay in memory.

    memory = weights that every token touches + keys and values + work of a prompt + slots of experts

The program itself, Python and PyTorch, comes on top: `program_bytes` says what it has now.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moekit.config.errors import ConfigError, require
from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig
from moekit.kernels.quantized import BLOCK
from moekit.serve.model_source import ModelSource, stacked_experts

PRECISIONS = ("stored", "auto", "float32", "bfloat16", "int8", "int4")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
GROUP = 64  # inputs that share a scale, in int8 and int4 that are made at opening


def bytes_of(memory: str | int | float, field: str = "memory") -> int:
    """Bytes of a size such as "2GB", "1.5 GiB", "800MB" or 800e6; KB, MB and GB are powers of 1000.

    >>> bytes_of("2GB"), bytes_of("1.5 GiB"), bytes_of(800e6)
    (2000000000, 1610612736, 800000000)
    """
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", memory)
        known = match is not None and match[2].upper() in _UNITS
        require(known, field, memory, "must be a number with a unit", "Write it as 2GB, 1.5GiB or 800MB")
        assert match is not None
        memory = float(match[1]) * _UNITS[match[2].upper()]
    require(memory > 0, field, memory, "must be more than 0")
    return int(memory)


@dataclass(frozen=True)
class Form:
    """Experts of one form, which share slots.

    Attributes:
        layers: numbers of the sparse layers among all sparse ones, and their experts.
        expert_bytes: of one of them.
        top_k: the most that a token needs of a layer.
        slots: how many are in memory at a time.
    """

    layers: Mapping[int, int]
    expert_bytes: int
    top_k: int
    slots: int

    @property
    def n_experts(self) -> int:
        return sum(self.layers.values())


@dataclass(frozen=True)
class MemoryPlan:
    """What takes how much memory.

    Attributes:
        memory: that is allowed, or None for all that is wanted.
        precision: "float32", "bfloat16", "float16", "int8" or "int4", of the experts.
        dense_bytes: weights that every token touches, the embeddings in full.
        cache_bytes: keys and values of `context` tokens.
        work_bytes: of reading a prompt of that length, an estimate; with room for one expert on its way.
        forms: the experts.
        exact: whether the experts are those that are stored, without rounding.
    """

    memory: int | None
    precision: str
    context: int
    dense_bytes: int
    cache_bytes: int
    work_bytes: int
    forms: tuple[Form, ...]
    exact: bool

    @property
    def fixed_bytes(self) -> int:
        return self.dense_bytes + self.cache_bytes + self.work_bytes

    @property
    def expert_bytes(self) -> int:
        """Of all experts."""
        return sum(form.expert_bytes * form.n_experts for form in self.forms)

    @property
    def slot_bytes(self) -> int:
        """Of the experts that are in memory at a time."""
        return sum(form.expert_bytes * form.slots for form in self.forms)

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.slot_bytes

    @property
    def least_bytes(self) -> int:
        """Below this the model does not run."""
        return self.fixed_bytes + sum(form.expert_bytes * form.top_k for form in self.forms)

    @property
    def fits_wholly(self) -> bool:
        return all(form.slots == form.n_experts for form in self.forms)

    @property
    def share_in_memory(self) -> float:
        """Of the experts' bytes."""
        return self.slot_bytes / self.expert_bytes if self.expert_bytes else 1.0

    def memory_for(self, share: float) -> int:
        """The memory with which this share of the experts' bytes stays in memory.

        Shares of single experts are rounded up, and never below what one token needs.
        """
        slots = sum(
            form.expert_bytes * max(form.top_k, -int(-share * form.n_experts // 1)) for form in self.forms
        )
        return self.fixed_bytes + slots

    def report(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "memory": self.memory,
            "precision": self.precision,
            "exact": self.exact,
            "context": self.context,
            "bytes": {
                "dense": self.dense_bytes, "keys_and_values": self.cache_bytes, "work": self.work_bytes,
                "experts_in_memory": self.slot_bytes, "total": self.total_bytes,
            },
            "expert_bytes": self.expert_bytes,
            "least_bytes": self.least_bytes,
            "fits_wholly": self.fits_wholly,
            "share_in_memory": self.share_in_memory,
            "experts": sum(form.n_experts for form in self.forms),
            "experts_in_memory": sum(form.slots for form in self.forms),
        }  # fmt: skip


def plan_memory(
    source: ModelSource,
    memory: str | int | float | None,
    *,
    context: int | None = None,
    precision: str = "stored",
) -> MemoryPlan:
    """How a decoder fits a memory.

    Args:
        source: the decoder.
        memory: bytes, or a text such as "2GB"; None for as much as it takes.
        context: tokens of prompt and answer; the longest that the model takes where None or more than it.
        precision: "stored" keeps every weight as it is. "float32" and "bfloat16" round to these. "int8" and "int4"
            quantise experts at opening, without calibration, where all of them stay in memory then; `moekit compress
            quantize` makes better ones, which may lie on disk. "auto" takes the most exact in which all stay in memory,
            and "stored" where there is none.

    Errors: `ConfigError` where the memory is less than one token needs, or the precision is not to be had.
    """
    require(precision in PRECISIONS, "precision", precision, f"must be one of {', '.join(PRECISIONS)}")
    longest = source.config.max_seq_len
    context = longest if context is None else min(context, longest)
    require(context >= 1, "context", context, "must be at least 1")
    allowed = None if memory is None else bytes_of(memory)
    if precision == "auto":
        for one in precisions_of(source):
            plan = _plan(source, allowed, context, one)
            if plan.fits_wholly:
                return plan
        precision = "stored"
    plan = _plan(source, allowed, context, precision)
    if allowed is not None and allowed < plan.least_bytes:
        parts = " + ".join(str(form.expert_bytes * form.top_k) for form in plan.forms)
        raise ConfigError(
            f"memory must be at least {plan.least_bytes:,} bytes, what every token touches ({plan.fixed_bytes:,}) and "
            f"the experts that one token needs of a layer ({parts}); got {allowed:,}. Allow more, lower --context "
            f"({context:,}), or make the experts smaller: moekit compress quantize --bits 4"
        )
    if precision in ("int8", "int4") and not plan.fits_wholly:
        raise ConfigError(
            f"precision must be stored where not all experts fit in {precision} "
            f"({plan.fixed_bytes + plan.expert_bytes:,} bytes); got {precision!r} with memory {allowed:,}. Quantise "
            "the model once, with calibration, and open that: moekit compress quantize"
        )
    return plan


def precisions_of(source: ModelSource) -> list[str]:
    """What a model's experts can be held in, the most exact first; "stored" comes first."""
    if any(moe.quantization is not None for moe in _moe_configs(source.config)):
        return ["stored"]
    found = ["stored"]
    if source.stored_type() == torch.float32:
        found.append("bfloat16")
    sizes = [(source.config.d_model, moe.d_expert) for moe in _moe_configs(source.config)]
    if all(d % GROUP == 0 and f % GROUP == 0 for d, f in sizes):
        found += ["int8", "int4"]
    return found


def compute_type(source: ModelSource, precision: str) -> torch.dtype:
    """What a plan's model computes in."""
    if precision in ("float32", "bfloat16"):
        return torch.float32 if precision == "float32" else torch.bfloat16
    return source.stored_type()


def _moe_configs(config: ModelConfig) -> list[MoEConfig]:
    found = [config.moe_of(index) for index in range(config.n_layers)]
    return [moe for moe in found if moe is not None]


def _plan(source: ModelSource, memory: int | None, context: int, precision: str) -> MemoryPlan:
    config, dtype = source.config, compute_type(source, precision)
    if precision in ("int8", "int4") and precision not in precisions_of(source):
        raise ConfigError(
            f"precision must be one of {', '.join(precisions_of(source))} for this model; got {precision!r}: it is "
            f"quantised already, or d_model and d_expert are no multiples of {GROUP}"
        )
    model = source.skeleton()
    sparse = list(stacked_experts(model))
    prefixes = tuple(f"{name}." for _, name, _ in sparse)
    dense = 0
    for name, tensor in model.state_dict().items():
        if name.startswith(prefixes) or (name == "head.weight" and config.tie_embeddings):
            continue
        dense += tensor.numel() * (dtype.itemsize if tensor.dtype == torch.float32 else tensor.itemsize)
    forms: dict[tuple[Any, ...], tuple[dict[int, int], int, int]] = {}
    named, widest = precision, 0
    for number, (moe, _, experts) in enumerate(sparse):
        n, quantised = moe.config.n_experts, moe.config.quantization
        shapes = [tuple(t.shape[1:]) for t in experts.state_dict().values()]
        if quantised is not None:
            each = sum(t[0].nbytes if t.dtype in (torch.uint8, torch.bfloat16) else t[0].numel() * dtype.itemsize
                       for t in experts.state_dict().values())  # fmt: skip
            named = f"int{quantised.bits}"
        elif precision in ("int8", "int4"):
            each = _quantised_bytes(experts.state_dict(), int(precision[3:]), dtype)
        else:
            each = sum(t[0].numel() for t in experts.state_dict().values()) * dtype.itemsize
            named = str(dtype).removeprefix("torch.")
        key = (tuple(shapes), each, moe.config.activation)
        layers, _, top_k = forms.get(key, ({}, 0, 0))
        forms[key] = ({**layers, number: n}, each, max(top_k, min(moe.config.top_k, n)))
        widest = max(widest, experts.weights.w_in.shape[1])
    largest = max((each for _, each, _ in forms.values()), default=0)
    cache, work = _cache_bytes(config, context, dtype), _work_bytes(config, context, dtype, widest, largest)
    exact = precision == "stored" or (precision == str(source.stored_type()).removeprefix("torch."))
    found = tuple(Form(layers, each, k, k) for layers, each, k in forms.values())
    bare = MemoryPlan(memory, named, context, dense, cache, work, found, exact)
    slots = _shared_out(found, None if memory is None else memory - bare.fixed_bytes)
    sized = tuple(
        Form(form.layers, form.expert_bytes, form.top_k, n) for form, n in zip(found, slots, strict=True)
    )
    return MemoryPlan(memory, named, context, dense, cache, work, sized, exact)


def _shared_out(forms: Sequence[Form], room: int | None) -> list[int]:
    """Slots of each form: what a token needs, and the same share of the rest of each."""
    if room is None:
        return [form.n_experts for form in forms]
    rest = room - sum(form.expert_bytes * form.top_k for form in forms)
    wanted = sum(form.expert_bytes * (form.n_experts - form.top_k) for form in forms)
    share = min(max(rest, 0) / wanted, 1.0) if wanted else 1.0
    return [form.top_k + int(share * (form.n_experts - form.top_k)) for form in forms]


def _quantised_bytes(state: Mapping[str, torch.Tensor], bits: int, dtype: torch.dtype) -> int:
    total = 0
    for tensor in state.values():
        if tensor.ndim == 2:  # biases stay as they are
            total += tensor[0].numel() * dtype.itemsize
            continue
        _, n_out, n_in = tensor.shape
        padded = -(-n_out // BLOCK) * BLOCK
        total += padded * n_in * bits // 8 + padded * (n_in // GROUP) * 2
    return total


def _cache_bytes(config: ModelConfig, context: int, dtype: torch.dtype) -> int:
    latent = config.latent_attention
    width = 2 * config.kv_heads * config.head_width if latent is None else latent.kv_rank + latent.d_rope
    return config.n_layers * context * width * dtype.itemsize


def _work_bytes(config: ModelConfig, context: int, dtype: torch.dtype, widest: int, largest: int) -> int:
    """Vectors of a layer at work on a prompt of `context` tokens, answers of its experts, the last token's logits."""
    top_k = max((moe.top_k for moe in _moe_configs(config)), default=1)
    attention = 3 * config.n_heads * config.head_width
    a_token = (8 + 2 * top_k) * config.d_model + attention + widest
    n_experts = max((moe.n_choices for moe in _moe_configs(config)), default=0)
    return context * (a_token * dtype.itemsize + 4 * 4 * n_experts) + 3 * 4 * config.vocab_size + largest


def program_bytes() -> int | None:
    """Memory that this process has now; None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
