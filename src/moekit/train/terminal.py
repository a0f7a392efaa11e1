"""The live view of a training run: a small panel in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

from rich.console import Console, Group
from rich.errors import LiveError
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

_FRAME = 0.25  # seconds between two drawings, at least
_HISTORY = 512  # losses kept for the sparkline; beyond, neighbours are averaged
_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"


class TrainingView:
    """Loss, speed and the load of the experts while a run goes on.

    In a terminal a panel is redrawn in place, at most four times a second and only from `update`, so that no
    thread and hardly any time is spent on it. Elsewhere (a file, a pipe, a notebook, a terminal that cannot
    move its cursor) a plain line is printed every `plain_interval` seconds, and whenever a new note arrives.

    >>> from io import StringIO
    >>> out = StringIO()
    >>> with TrainingView(300, "moe", console=Console(file=out, width=100)) as view:
    ...     view.update(120, loss=3.2141, tokens_per_second=6812.4, max_violation=0.12, dropped_share=0.0,
    ...                 eta_seconds=151)
    >>> print(out.getvalue(), end="")
    moe · step 120/300 · loss 3.214 · 6,812 tokens/s · max violation 0.12 · dropped 0.0% · ETA 2:31
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        console: Console | None = None,
        *,
        plain_interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.title = total_steps, title
        self.console = console if console is not None else Console()
        self.plain_interval, self._clock = plain_interval, clock
        self._live: Live | None = None
        self._step = 0
        self._values: dict[str, Any] = {}
        self._losses: list[float] = []
        self._stride = self._pending = 1  # every how many-th loss is kept, and how many until the next
        self._began = clock()
        self._drawn = -math.inf
        self._printed = ""

    def __enter__(self) -> TrainingView:
        self._began = self._clock()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            live = Live(console=self.console, auto_refresh=False, get_renderable=lambda: self)
            try:
                live.start()
                self._live = live
            except LiveError:  # another live display is running: two cannot share the cursor
                pass
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()  # draws the last state
            self._live = None
        elif self._values:
            self._print()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        load: Sequence[float] | None = None,
        max_violation: float | None = None,
        dropped_share: float | None = None,
        eta_seconds: float | None = None,
        note: str | None = None,
    ) -> None:
        """Show the state after `step` steps; what is None stays as it was.

        Args:
            load: tokens of each expert, as counts or shares, averaged over the layers.
            dropped_share: share of routed rows that found their expert full, 0 to 1.
            note: one line of text, such as the last validation.
        """
        self._step = step
        values = {
            "loss": loss,
            "speed": tokens_per_second,
            "load": None if load is None else list(load),
            "violation": max_violation,
            "dropped": dropped_share,
            "eta": eta_seconds,
            "note": note,
        }
        new_note = note is not None and note != self._values.get("note")
        self._values.update({name: value for name, value in values.items() if value is not None})
        if loss is not None and math.isfinite(loss):
            self._remember(loss)
        now = self._clock()
        if self._live is not None:
            if now - self._drawn >= _FRAME:
                self._drawn = now
                self._live.refresh()
        elif now - self._drawn >= self.plain_interval or new_note:
            self._drawn = now
            self._print()

    def alarm(self, text: str) -> None:
        """A line that stays: above the panel, or among the plain lines.

        >>> from io import StringIO
        >>> out = StringIO()
        >>> with TrainingView(300, "moe", console=Console(file=out, width=60)) as view:
        ...     view.alarm("layer 0: expert 3 is dead")
        >>> print(out.getvalue(), end="")
        alarm: layer 0: expert 3 is dead
        """
        self.console.print(Text(self._encodable(f"alarm: {text}"), style="red"), soft_wrap=True)

    def __rich__(self) -> Panel:
        width = max(20, self.console.width - 4)
        ascii_only = self.console.options.ascii_only
        lines = [self._progress_line(width, ascii_only)]
        if "loss" in self._values:
            lines.append(self._loss_line(width, ascii_only))
        if facts := self._facts():
            lines.append(Text("   ").join(Text.assemble((f"{name} ", "dim"), value) for name, value in facts))
        if self._values.get("load"):
            lines += _load_lines(self._values["load"], width, ascii_only)
        if note := self._values.get("note"):
            lines.append(Text(self._encodable(note), style="italic"))
        for line in lines:
            line.no_wrap, line.overflow = True, "crop" if ascii_only else "ellipsis"
        elapsed = _duration(self._clock() - self._began)
        return Panel(
            Group(*lines), title=Text(self._encodable(self.title), style="bold"), title_align="left",
            subtitle=Text(f"{elapsed} so far", style="dim"), subtitle_align="right", border_style="blue",
        )  # fmt: skip

    def _progress_line(self, width: int, ascii_only: bool) -> Text:
        share = min(1.0, self._step / self.total_steps) if self.total_steps else 1.0
        left = f"step {self._step:>{len(str(self.total_steps))}}/{self.total_steps} "
        right = f" {share:4.0%}"
        if "eta" in self._values:
            right += f"   ETA {_duration(self._values['eta']):>7}"
        room = max(0, width - len(left) - len(right))
        done = int(room * share)
        full, rest = ("#", "-") if ascii_only else ("━", "─")
        return Text.assemble(left, (full * done, "blue"), (rest * (room - done), "dim"), right)

    def _loss_line(self, width: int, ascii_only: bool) -> Text:
        loss = self._values["loss"]
        text = f"{loss:.3f}"
        line = Text.assemble(("loss ", "dim"), (text, "bold" if math.isfinite(loss) else "bold red"), "  ")
        line.append(_sparkline(self._losses, width - line.cell_len, ascii_only), style="cyan")
        return line

    def _facts(self) -> list[tuple[str, str]]:
        forms = {"speed": ("tokens/s", "{:,.0f}"), "violation": ("max violation", "{:.2f}"),
                 "dropped": ("dropped", "{:.1%}")}  # fmt: skip
        return [
            (label, form.format(self._values[name]))
            for name, (label, form) in forms.items()
            if name in self._values
        ]

    def _print(self) -> None:
        parts = [self.title, f"step {self._step}/{self.total_steps}"]
        if "loss" in self._values:
            parts.append(f"loss {self._values['loss']:.3f}")
        for name, value in self._facts():
            parts.append(f"{value} {name}" if name == "tokens/s" else f"{name} {value}")
        if "eta" in self._values:
            parts.append(f"ETA {_duration(self._values['eta'])}")
        if "note" in self._values:
            parts.append(str(self._values["note"]))
        line = (" - " if self.console.options.ascii_only else " · ").join(parts)
        if line != self._printed:
            self._printed = line
            self.console.print(Text(self._encodable(line)), soft_wrap=True)

    def _encodable(self, text: str) -> str:
        """One line of `text` that the terminal's encoding can show: a title must never end a run."""
        encoding = self.console.encoding
        return " ".join(text.split()).encode(encoding, "replace").decode(encoding)

    def _remember(self, loss: float) -> None:
        self._pending -= 1
        if self._pending == 0:
            self._losses.append(loss)
            if len(self._losses) >= _HISTORY:
                self._losses = [
                    (a + b) / 2 for a, b in zip(self._losses[::2], self._losses[1::2], strict=True)
                ]
                self._stride *= 2
            self._pending = self._stride


def _sparkline(values: Sequence[float], width: int, ascii_only: bool) -> str:
    """The whole history in `width` columns at most, scaled from its smallest to its largest value."""
    if not values or width < 1:
        return ""
    columns = min(width, len(values))
    bounds = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    glyphs = (_ASCII if ascii_only else _BLOCKS)[1:]
    scale = (len(glyphs) - 1) / (high - low) if high > low else 0.0
    return "".join(glyphs[round((mean - low) * scale)] for mean in means)


def _load_lines(load: Sequence[float], width: int, ascii_only: bool) -> list[Text]:
    """Two rows of bars, the boundary between them at the mean load, and a line with the extremes.

    Where the experts outnumber the columns, a bar is the mean of neighbours, coloured as the worst of them.
    """
    mean = sum(load) / len(load)
    ratios = [value / mean if mean > 0 else 0.0 for value in load]
    axis = ("load 2x |", "     1x |") if ascii_only else ("load 2× │", "     1× │")
    room = max(1, width - len(axis[0]))
    per_bar = math.ceil(len(ratios) / room)
    groups = [ratios[start : start + per_bar] for start in range(0, len(ratios), per_bar)]
    pitch = max(1, min(5, room // len(groups)))
    bar, gap = (pitch, 0) if pitch == 1 else (pitch - 1, 1)
    glyphs = _ASCII if ascii_only else _BLOCKS
    steps = len(glyphs) - 1
    rows = [Text.assemble((name, "dim")) for name in axis]
    bars = []
    for group in groups:
        level = round(min(2.0, sum(group) / len(group)) * steps)
        style = max((_health(ratio) for ratio in group), key=["green", "yellow", "red"].index)
        top, bottom = glyphs[max(0, level - steps)], glyphs[max(1, min(steps, level))]
        bars.append((style, top * bar + " " * gap, bottom * bar + " " * gap))
    for style, equals in groupby(bars, key=itemgetter(0)):  # one span for all neighbours: cheaper to draw
        for row, parts in zip(rows, list(zip(*equals, strict=True))[1:], strict=True):
            row.append("".join(parts), style=style)
    low, high = min(ratios), max(ratios)
    times = "x" if ascii_only else "×"
    together = f" ({per_bar} a bar)" if per_bar > 1 else ""
    caption = (
        f"{len(ratios)} experts{together}: {low:.2f}{times} (#{ratios.index(low)}) "
        f"to {high:.2f}{times} (#{ratios.index(high)}) of the mean"
    )
    rows.append(Text(" " * len(axis[0]) + caption, style="dim"))
    return rows


def _health(ratio: float) -> str:
    if ratio < 0.05 or ratio > 3:
        return "red"  # dead, or computing for many others
    return "yellow" if ratio < 0.5 or ratio > 1.5 else "green"


def _duration(seconds: float) -> str:
    """`2:31`, `1:02:03` or `3d 04:05`; `?` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
