"""The experts' feed-forward: rows sorted by expert through one small MLP per expert.

Shapes: rows `[R, D]` sorted by expert, `tokens_per_expert` `[E]` summing to R, the experts as `ExpertWeights`; result
`[R, O]` in the type of the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.kernels.expert_weights import ExpertWeights
from moekit.kernels.registry import Usable, register


def _always(device: torch.device, dtype: torch.dtype) -> Usable:
    return True, "plain PyTorch, runs everywhere"


@register("expert_mlp", "reference", priority=0, usable=_always)
def expert_mlp_reference(
    rows: Tensor,
    tokens_per_expert: Tensor,
    weights: ExpertWeights,
) -> Tensor:
    """The truth: one expert after the other."""
    # unbind once: indexing w[i] in the loop would make autograd build a full-size gradient per expert
    ins, outs = (w.unbind(0) for w in weights.out_in())
    none = [None] * len(ins)
    ins_b = none if weights.b_in is None else weights.b_in.unbind(0)
    outs_b = none if weights.b_out is None else weights.b_out.unbind(0)
    answers = []
    for i, part in enumerate(rows.split(tokens_per_expert.tolist())):
        hidden = weights.activation(F.linear(part, ins[i], ins_b[i]), weights.interleaved)
        answers.append(F.linear(hidden, outs[i], outs_b[i]))
    return torch.cat(answers)


def _grouped_mm_usable(device: torch.device, dtype: torch.dtype) -> Usable:
    if not hasattr(F, "grouped_mm"):
        return False, f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if dtype != torch.bfloat16:
        return False, f"needs bfloat16, got {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return False, "needs a GPU of compute capability 8.0 or newer"
    if device.type not in ("cpu", "cuda"):
        return False, f"not written for {device.type}"
    return True, "one grouped matrix product for all experts"


@register("expert_mlp", "grouped_mm", priority=10, usable=_grouped_mm_usable)
def expert_mlp_grouped(
    rows: Tensor,
    tokens_per_expert: Tensor,
    weights: ExpertWeights,
) -> Tensor:
    """All experts in one grouped product per map (PyTorch's own kernel), where widths are multiples of 8.

    On the CPU each expert's rows are padded with zeros to a multiple of `CPU_BLOCK`: the library underneath
    compiles a kernel for every new number of rows, and routing brings new numbers at every step.
    """
    w_in, w_out = weights.out_in()
    if rows.shape[0] == 0 or any(size % 8 for size in (*w_in.shape[1:], *w_out.shape[1:])):
        return expert_mlp_reference(rows, tokens_per_expert, weights)
    place = None
    if rows.device.type == "cpu":
        rows, tokens_per_expert, place = _pad(rows, tokens_per_expert, CPU_BLOCK)
    ends = tokens_per_expert.cumsum(0).to(torch.int32)
    hidden = F.grouped_mm(rows, w_in.transpose(-2, -1), offs=ends)
    if weights.b_in is not None:
        hidden = hidden + weights.b_in.repeat_interleave(tokens_per_expert, dim=0)
    hidden = weights.activation(hidden, weights.interleaved)
    answers = F.grouped_mm(hidden, w_out.transpose(-2, -1), offs=ends)
    if weights.b_out is not None:
        answers = answers + weights.b_out.repeat_interleave(tokens_per_expert, dim=0)
    return answers if place is None else answers.index_select(0, place)


CPU_BLOCK = 64


def _pad(rows: Tensor, tokens_per_expert: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with each expert's part padded with zeros, the padded counts, and where each row went."""
    padded = (tokens_per_expert + block - 1) // block * block
    shift = (padded.cumsum(0) - padded) - (tokens_per_expert.cumsum(0) - tokens_per_expert)
    place = torch.arange(rows.shape[0], device=rows.device) + shift.repeat_interleave(tokens_per_expert)
    return rows.new_zeros(int(padded.sum()), rows.shape[1]).index_copy(0, place, rows), padded, place
