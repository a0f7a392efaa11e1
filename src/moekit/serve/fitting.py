"""Open a decoder within a given memory: wholly where it fits, else with its experts on disk and a cache of slots.

    find_source ─► plan_memory ─► skeleton on the meta device ─► dense weights read
                                                            ├► all experts read into their stacks, or
                                                            └► StoredMLP in their place, store, foresight

What comes out computes the same bits either way.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.errors import ConfigError
from moekit.config.moe import QuantizationConfig
from moekit.convert.formats.opening import OpenedModel, tokenizer_of
from moekit.data.tokenizer import Tokenizer, load_tokenizer
from moekit.kernels.expert_weights import ExpertWeights
from moekit.kernels.quantized import QuantizedMatrix, empty_matrix, quantize
from moekit.layers.experts import StackedMLP
from moekit.layers.moe import MoE
from moekit.layers.quantized import QuantizedWeight
from moekit.layers.stored_experts import StoredMLP
from moekit.models.language_model import LanguageModel
from moekit.observe.record import RoutingRecord
from moekit.serve.eviction import make_policy
from moekit.serve.expert_store import ExpertKey, ExpertStore, LayerPlaces, Shelf
from moekit.serve.foresight import Foresight
from moekit.serve.memory_plan import GROUP, MemoryPlan, compute_type, plan_memory
from moekit.serve.model_source import ModelSource, find_source, stacked_experts
from moekit.serve.record_forecast import uses_of
from moekit.serve.weight_files import Place


@dataclass
class FittedModel:
    """A model that keeps within a memory; close it, or use it as a context, where experts are on disk.

    Attributes:
        opened: the model with what belongs to it, as `open_model` gives it.
        plan: what takes how much memory.
        store: the experts; None where all are in memory.
        source: the open files; they are closed where all is in memory.
    """

    opened: OpenedModel
    plan: MemoryPlan
    store: ExpertStore | None
    source: ModelSource
    foresight: Foresight | None = field(default=None, repr=False)

    @property
    def model(self) -> LanguageModel:
        return self.opened.decoder

    def close(self) -> None:
        """End the reading thread and let go of the files; a model with experts on disk computes no more."""
        if self.foresight is not None:
            self.foresight.close()
        if self.store is not None:
            self.store.close()
        self.source.close()

    def __enter__(self) -> FittedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def report(self) -> dict[str, Any]:
        """The plan, and what the store did; JSON-ready."""
        done = {} if self.store is None else {"store": self.store.counts.report()}
        return {"plan": self.plan.report(), **done}


def fit_to_memory(
    source: str | Path,
    memory: str | int | float | None,
    *,
    context: int | None = None,
    precision: str = "stored",
    policy: str = "aged",
    read_ahead: bool | None = None,
    keep_pages: bool = True,
    record: RoutingRecord | None = None,
    trace: bool = False,
) -> FittedModel:
    """Open a decoder so that it keeps within a memory, with equal answers however little is allowed.

    Args:
        source: a run, a folder of moekit, or a Hugging Face folder or name.
        memory: bytes or a text such as "2GB", for weights, keys and values, and the work of a prompt; the program
            itself (Python, PyTorch) comes on top. None for as much as it takes.
        context: tokens of prompt and answer; the longest that the model takes where None.
        precision: see `plan_memory`.
        policy: "aged" or "lru": which expert leaves for another; see `moekit.serve.eviction`.
        read_ahead: whether a thread reads the experts that the next layer will probably need; None: where reading one
            takes so long that it pays.
        keep_pages: whether the system may keep what was read in its page cache, outside the memory.
        record: what routers decided on similar text: the experts that it used most are read at once.
        trace: keep what was asked for in `store.trace`.

    Errors: `ConfigError` where the memory is less than one token needs or the model cannot be read in pieces,
    `DataError` for damaged files.
    """
    found = find_source(source, keep_pages)
    store, foresight = None, None
    try:
        plan = plan_memory(found, memory, context=context, precision=precision)
        dtype = compute_type(found, precision if plan.precision in ("int8", "int4") else plan.precision)
        made = plan.precision if plan.precision in ("int8", "int4") and not _is_quantised(found) else None
        if made is not None:
            found.config = _quantised_config(found, int(made[3:]))
        model = found.skeleton()
        fill = _Fill(found, model)
        _read_dense(found, model, dtype)
        if plan.fits_wholly:
            _read_experts(fill, dtype)
        else:
            store, foresight = _put_store(fill, plan, dtype, policy, read_ahead, record, trace)
        _require_values(model)
        opened = _opened(found, model)
    except BaseException:
        if store is not None:
            store.close()
        found.close()
        raise
    if store is None:
        found.close()
    return FittedModel(opened, plan, store, found, foresight)


class _Fill:
    """Reads an expert of a sparse layer into a place of a stack."""

    def __init__(self, source: ModelSource, model: nn.Module) -> None:
        self.source, self.model = source, model
        self.sparse: list[tuple[MoE, str, StackedMLP]] = list(stacked_experts(model))
        self._parts: list[list[list[tuple[str, int, Place]]]] = []
        for moe, name, experts in self.sparse:
            tensors = [(one, source.has(f"{name}.{one}")) for one in experts.state_dict()]
            n = moe.config.n_experts
            # quantised at opening: the files hold the weights that codes and scales are made of
            shorts = [one if there else one.rsplit(".", 1)[0] for one, there in tensors]
            of_layer: list[list[tuple[str, int, Place]]] = []
            for expert in range(n):
                parts, first = [], 0
                for short in dict.fromkeys(shorts):
                    first = 0
                    for place in source.expert_parts(f"{name}.{short}", expert, n):
                        n_values = torch.Size(place.shape).numel()
                        parts.append((short, first, place))
                        first += n_values
                of_layer.append(parts)
            self._parts.append(of_layer)

    def __call__(self, key: ExpertKey, weights: ExpertWeights, slot: int) -> int:
        layer, expert = key
        n_bytes = 0
        for short, first, place in self._parts[layer][expert]:
            to = _stack(weights, short)
            n_values = torch.Size(place.shape).numel()
            n_bytes += place.n_bytes
            if isinstance(to, QuantizedMatrix):
                self._quantise(place, to, slot, first)
            else:
                self.source.files.read(place, to[slot].view(-1)[first : first + n_values])
        return n_bytes

    def _quantise(self, place: Place, to: QuantizedMatrix, slot: int, first: int) -> None:
        _, n_out, n_in = to.shape
        if first == 0:
            self._whole = torch.empty(n_out * n_in)
        n_values = torch.Size(place.shape).numel()
        self.source.files.read(place, self._whole[first : first + n_values])
        if first + n_values == n_out * n_in:
            made = quantize(self._whole.view(1, n_out, n_in), to.bits, to.group_size)
            to.codes[slot], to.scales[slot] = made.codes[0], made.scales[0]


def _stack(weights: ExpertWeights, short: str) -> Tensor | QuantizedMatrix:
    name, _, part = short.partition(".")
    stack = getattr(weights, name)
    found: Tensor | QuantizedMatrix = getattr(stack, part) if part else stack
    return found


def _is_quantised(source: ModelSource) -> bool:
    moes = [source.config.moe_of(index) for index in range(source.config.n_layers)]
    return any(moe is not None and moe.quantization is not None for moe in moes)


def _quantised_config(source: ModelSource, bits: int) -> Any:
    from moekit.compress.reshaping import with_layers

    how = QuantizationConfig.from_dict({"bits": bits, "group_size": GROUP}, "precision")
    changes = {}
    for index in range(source.config.n_layers):
        moe = source.config.moe_of(index)
        if moe is not None:
            changes[index] = moe.replace(quantization=how)
    return with_layers(source.config, changes)


def _read_experts(fill: _Fill, dtype: torch.dtype) -> None:
    """Give every stack its values."""
    for layer, (moe, _, experts) in enumerate(fill.sparse):
        weights = _stacks(experts, moe.config.n_experts, dtype)
        for expert in range(moe.config.n_experts):
            fill((layer, expert), weights, expert)
        for name in ("w_in", "w_out", "b_in", "b_out"):
            value = getattr(weights, name)
            if isinstance(value, QuantizedMatrix):
                getattr(experts, name).put(value)
            elif value is not None:
                setattr(experts, name, nn.Parameter(value))


def _put_store(
    fill: _Fill,
    plan: MemoryPlan,
    dtype: torch.dtype,
    policy: str,
    read_ahead: bool | None,
    record: RoutingRecord | None,
    trace: bool,
) -> tuple[ExpertStore, Foresight]:
    """`StoredMLP`s in the place of all stacks, and what serves them."""
    uses = {} if record is None else uses_of(record, [moe.config.n_experts for moe, _, _ in fill.sparse])
    shelves = []
    for form in plan.forms:
        first = next(iter(form.layers))
        weights = _stacks(fill.sparse[first][2], form.slots, dtype)
        counts: dict[Hashable, float] = {key: count for key, count in uses.items() if key[0] in form.layers}
        # half of the slots compute while the thread fills the others
        at_once = max(form.top_k, form.slots // 2) if read_ahead is not False else form.slots
        rule = make_policy(policy, form.top_k * len(form.layers), counts)
        shelves.append(Shelf(weights, form.layers, at_once, rule))
    store = ExpertStore(shelves, fill, read_ahead=read_ahead, trace=trace)
    try:
        places: list[LayerPlaces | None] = []
        for layer, (_, name, experts) in enumerate(fill.sparse):
            of_layer = store.places(layer)
            parent, _, own = name.rpartition(".")
            setattr(fill.model.get_submodule(parent), own, StoredMLP(of_layer, experts.kernel))
            places.append(of_layer)
        assert isinstance(fill.model, LanguageModel)
        foresight = Foresight(fill.model.backbone, places if read_ahead is not False else [], store)
        store.preload(sorted(uses, key=lambda key: -uses[key]))
    except BaseException:
        store.close()
        raise
    return store, foresight


def _stacks(experts: StackedMLP, n: int, dtype: torch.dtype) -> ExpertWeights:
    """Stacks like those of `experts` for `n` of them, without values."""

    def stack(part: Tensor | QuantizedWeight | None) -> Any:
        if part is None:
            return None
        if isinstance(part, QuantizedWeight):
            size = (n, *part.size[1:])
            return empty_matrix(size, part.config.bits, part.config.group_size)
        return torch.empty(n, *part.shape[1:], dtype=dtype)

    w_in, w_out, b_in, b_out = map(stack, (experts.w_in, experts.w_out, experts.b_in, experts.b_out))
    return ExpertWeights(w_in, w_out, b_in, b_out, experts.activation)


def _read_dense(source: ModelSource, model: LanguageModel, dtype: torch.dtype) -> None:
    state: dict[str, Tensor] = {}
    tied = source.config.tie_embeddings
    experts = tuple(f"{name}." for _, name, _ in stacked_experts(model))
    for name, own in model.state_dict().items():
        if name.startswith(experts) or not own.is_meta or (tied and name == "head.weight"):
            continue
        if name.endswith((".codes", ".scales")) and not source.has(name):
            base, _, part = name.rpartition(".")
            module = model.get_submodule(base)
            assert isinstance(module, QuantizedWeight)
            weight = source.tensor(base).float().view(module.size)
            made = quantize(weight, module.config.bits, module.config.group_size)
            state[name] = made.codes if part == "codes" else made.scales
            continue
        # biases on the choice of experts stay float32, whole numbers and quantised weights as they are
        keeps = name.endswith("expert_bias") or own.dtype != torch.float32
        state[name] = source.tensor(name).to(own.dtype if keeps else dtype).contiguous()
    if tied:
        state["head.weight"] = state["stem.weight"]
    model.load_state_dict(state, strict=False, assign=True)
    if tied:
        model.head.weight = model.stem.weight


def _require_values(model: nn.Module) -> None:
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ConfigError(
            f"memory cannot be limited for this model: nothing on disk gives {', '.join(left[:3])}"
        )


def _opened(source: ModelSource, model: LanguageModel) -> OpenedModel:
    if source.kind == "run":
        tokenizer: Tokenizer | None = load_tokenizer(source.path / "tokenizer.json")
    else:
        tokenizer = tokenizer_of(source.tokenizer_files)
    return OpenedModel(
        model, source.path, source.kind, tokenizer, source.tokenizer_files, source.history, data=source.data
    )
