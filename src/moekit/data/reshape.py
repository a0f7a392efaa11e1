"""Examples that are made of others, as `data.reshape` asks for: histories of events, both directions of relations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moekit.config.errors import DataError
from moekit.config.task_reshape import AnyReshape, HistoriesReshape, ReciprocalReshape
from moekit.data.encoding.fields import category, numbers
from moekit.data.examples import Examples, TaskData


def reshaped_before_split(data: TaskData, reshape: AnyReshape | None) -> TaskData:
    """What must happen to whole data: histories, whose splits follow from the order of time."""
    return histories(data, reshape) if isinstance(reshape, HistoriesReshape) else data


def reshaped_after_split(data: TaskData, reshape: AnyReshape | None) -> TaskData:
    """What must happen in each split by itself: an inverse stays beside its triple."""
    if not isinstance(reshape, ReciprocalReshape):
        return data
    train, validation, test = (
        both_directions(part, reshape) for part in (data.train, data.validation, data.test)
    )
    return replace(data, train=train, validation=validation, test=test)


def both_directions(examples: Examples, reshape: ReciprocalReshape) -> Examples:
    """The examples, then their inverses.

    >>> two = both_directions(Examples({"head": ["cat"], "relation": ["is a"], "tail": ["pet"]}), ReciprocalReshape())
    >>> two["head"], two["relation"], two["tail"]
    (['cat', 'pet'], ['is a', 'inverse is a'], ['pet', 'cat'])
    """
    head, tail = reshape.swap
    found: dict[str, Any] = {name: [*values, *values] for name, values in examples.columns.items()}
    found[head] = [*examples[head], *examples[tail]]
    found[tail] = [*examples[tail], *examples[head]]
    relations = [category(value) for value in examples[reshape.relation]]
    found[reshape.relation] = [*relations, *(reshape.mark + relation for relation in relations)]
    return Examples(found)


def histories(data: TaskData, reshape: HistoriesReshape) -> TaskData:
    """One training example for each entity with two events: its events but the last, and the last.

    Validation and test have an example for each of their events, whose history is all that was before it. Where the
    data brings no test, the last event of everyone with three or more is tested on, and the one before it validates.

    Errors: `DataError` where an event has no time, and where nobody has two events.
    """
    splits = [data.train, data.validation, data.test]
    if len(data.test) == 0:
        splits = last_events(_together(splits[:2]), reshape)
    events: dict[str, list[tuple[float, int, int, str]]] = {}
    for number, part in enumerate(splits):
        times = numbers(part, reshape.time)
        for row, (who, what) in enumerate(zip(part[reshape.by], part[reshape.item], strict=True)):
            if times[row] != times[row]:
                raise DataError(f"example {row + 1}, column {reshape.time!r}: must hold a number, the time")
            events.setdefault(category(who), []).append((float(times[row]), number, row, category(what)))
    made: list[dict[str, list[Any]]] = [{"row": [], "history": []} for _ in splits]
    for found in events.values():
        # events of the same second stand in the order of the splits, then of the file
        found.sort(key=lambda event: event[:3])
        items = [event[3] for event in found]
        last = max((place for place, event in enumerate(found) if event[1] == 0), default=-1)
        for place, (_, number, row, _) in enumerate(found):
            if number == 0 and (place != last or place == 0):
                continue
            before = [event[3] for event in found[:place] if event[1] == 0] if number == 0 else items[:place]
            made[number]["row"].append(row)
            made[number]["history"].append(before)
    if not made[0]["row"]:
        raise DataError(f"nobody in column {reshape.by!r} has two events to learn an order from")
    parts = []
    for part, new in zip(splits, made, strict=True):
        chosen = part.rows(np.asarray(new["row"], dtype=np.int64))
        parts.append(Examples({**chosen.columns, reshape.history: new["history"]}))
    return replace(data, train=parts[0], validation=parts[1], test=parts[2])


def last_events(events: Examples, reshape: HistoriesReshape) -> list[Examples]:
    """[all before, the last but one of everyone, the last of everyone]; fewer than three are all in the first."""
    times = numbers(events, reshape.time)
    by: dict[str, list[int]] = {}
    for row in np.argsort(times, kind="stable"):
        by.setdefault(category(events[reshape.by][int(row)]), []).append(int(row))
    last = sorted(rows[-1] for rows in by.values() if len(rows) >= 3)
    before = sorted(rows[-2] for rows in by.values() if len(rows) >= 3)
    held = {*last, *before}
    return [
        events.rows([row for row in range(len(events)) if row not in held]),
        events.rows(before),
        events.rows(last),
    ]


def _together(parts: list[Examples]) -> Examples:
    full = [part for part in parts if len(part)]
    if len(full) < 2:
        return full[0] if full else parts[0]
    return Examples({name: [value for part in full for value in part[name]] for name in full[0].columns})
