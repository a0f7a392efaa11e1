"""What a routing record says of the tokens of a task's model.

Shape legend: B examples, S tokens of all stems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moekit.models.task_model import TaskOutput
from moekit.observe.recorder import Recorder


def token_ids(inputs: Mapping[str, Mapping[str, Tensor]], out: TaskOutput) -> Tensor | None:
    """`[B, S]` vocabulary ids of the tokens, -1 where there are none; None where no input has ids, or several have.

    Ids of several vocabularies would mean different things under one number.
    """
    read = {
        name: arrays["ids"]
        for name, arrays in inputs.items()
        if name in out.places and _fits(arrays.get("ids"), out.places[name])
    }
    if len(read) != 1 or not out.routing:
        return None
    ((name, ids),) = read.items()
    batch, length = out.routing[0].batch_shape
    place = out.places[name]
    if len(ids) != batch or place.stop > length:
        return None
    found = torch.full((batch, length), -1, dtype=torch.long, device=ids.device)
    found[:, place] = ids.long()
    return found


def _fits(ids: Tensor | None, place: slice) -> bool:
    return ids is not None and ids.dim() == 2 and ids.shape[1] == place.stop - place.start


def add_task(
    recorder: Recorder, inputs: Mapping[str, Mapping[str, Tensor]], out: TaskOutput, rows: Tensor,
    groups: Sequence[int], step: int = 0,
) -> None:  # fmt: skip
    """One forward pass of a task's model into a recorder.

    Args:
        recorder: with the model's layers.
        inputs: what the model read.
        out: what it gave.
        rows: `[B]` places of the examples among all.
        groups: of all examples.
        step: of training.
    """
    group = torch.tensor([groups[row] for row in rows.tolist()], dtype=torch.long)
    recorder.add(out.routing, token_ids=token_ids(inputs, out), groups=group, texts=rows, step=step)
