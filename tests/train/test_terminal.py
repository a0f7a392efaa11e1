"""The live view: what it shows, that it fits, and that it is cheap."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from moekit.train import terminal
from moekit.train.terminal import TrainingView

FRAME_END = re.compile(r"[╯+]")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Recorder(io.StringIO):
    """A file that remembers each write, and may have an encoding like a terminal."""

    def __init__(self, encoding="utf-8"):
        super().__init__()
        self._encoding, self.writes = encoding, []

    @property
    def encoding(self):
        return self._encoding

    def write(self, text):
        text.encode(self._encoding)
        self.writes.append(text)
        return super().write(text)


def view_in_terminal(width=80, total=300, encoding="utf-8", clock=None, **console):
    file = Recorder(encoding)
    console = Console(file=file, force_terminal=True, width=width, height=24, color_system=None, **console)
    return TrainingView(total, "moe", console=console, clock=clock or Clock()), file


def picture(view, width=80, encoding="utf-8"):
    """What the panel shows now, as lines without control codes."""
    file = Recorder(encoding)
    Console(file=file, width=width, color_system=None).print(view)
    return file.getvalue().splitlines()


def filled(width=80, load=(1, 2, 3, 2), total=300, **console):
    view, _ = view_in_terminal(width, total, **console)
    for step in range(1, 121):
        view.update(step, loss=8.0 - step / 20, tokens_per_second=6812.4, load=load, max_violation=0.5,
                    dropped_share=0.0131, eta_seconds=151.4, note="validation of step 100")  # fmt: skip
    return view


def test_what_is_shown():
    lines = picture(filled())
    text = "\n".join(lines)
    for part in ("moe", "step 120/300", "40%", "ETA    2:31", "loss 2.000", "tokens/s 6,812",
                 "max violation 0.50", "dropped 1.3%", "validation of step 100", "0:00 so far",
                 "4 experts: 0.50× (#0) to 1.50× (#2) of the mean"):  # fmt: skip
        assert part in text, part


def test_bars_by_hand():
    # loads 1, 2, 3, 2 are 0.5, 1, 1.5, 1 times the mean: 4, 8, 12, 8 eighths, of which the lower row shows
    # the first eight and the upper row the rest. 4 experts in 67 columns: bars of 4 columns, 1 between them
    upper, lower = picture(filled())[4:6]
    assert upper.strip("│ ").removeprefix("load 2× │").rstrip() == " " * 10 + "▄▄▄▄"
    assert "1× │▄▄▄▄ ████ ████ ████" in lower


def test_a_dead_expert_and_a_very_hot_one():
    view = filled(load=[0] + [1] * 6 + [9])
    lines = terminal._load_lines([0] + [1] * 6 + [9], 76, ascii_only=False)
    assert "1× │▁▁▁▁ " in picture(view)[5]
    colours = {str(span.style) for line in lines for span in line.spans}
    assert {"red", "green"} <= colours
    first_bar = next(span for span in lines[1].spans if span.start <= 9 < span.end)
    assert str(first_bar.style) == "red"
    assert lines[0].plain.count("█") == 4  # 4.8 times the mean is drawn as the 2 that fit


def test_more_experts_than_columns_share_bars():
    load = [1.0] * 256
    load[17] = 0.0
    lines = terminal._load_lines(load, 76, ascii_only=False)
    assert "256 experts (4 a bar): 0.00× (#17) to 1.00× (#0) of the mean" in lines[2].plain
    assert lines[1].plain.count("█") + lines[1].plain.count("▆") == 64
    worst = next(span for span in lines[1].spans if span.start <= 9 + 4 < span.end)
    assert str(worst.style) == "red"  # the bar of experts 16..19


def test_sparkline_by_hand():
    # scaled from the smallest to the largest: 0, 1/7 … 7/7 of the seven steps
    assert terminal._sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, ascii_only=False) == "▁▂▃▄▅▆▇█"
    assert terminal._sparkline([7, 7, 0, 0], 2, ascii_only=False) == "█▁"
    assert terminal._sparkline([3.0, 3.0], 10, ascii_only=False) == "▁▁"
    assert terminal._sparkline([], 10, ascii_only=False) == ""


@pytest.mark.parametrize("n_steps", [1, 511, 512, 513, 5000])
def test_the_sparkline_keeps_the_whole_run_in_bounded_memory(n_steps):
    view, _ = view_in_terminal(total=n_steps)
    for step in range(n_steps):
        view.update(step, loss=float(step))
    assert 0 < len(view._losses) <= 512
    assert view._losses == sorted(view._losses)
    assert view._losses[-1] >= 0.98 * (n_steps - 1)
    assert view._losses[0] <= 0.02 * n_steps


@pytest.mark.parametrize("width", [24, 40, 60, 79, 80, 81, 120, 200])
@pytest.mark.parametrize("n_experts", [0, 1, 2, 3, 8, 16, 63, 64, 67, 68, 256, 1000])
def test_nothing_is_wider_than_the_terminal(width, n_experts):
    view = filled(width, load=[1 + i % 3 for i in range(n_experts)] or None)
    view.update(120, note="a long note " * 30)
    lines = picture(view, width)
    assert {cell_len(line) for line in lines} == {width}
    assert len(lines) == (9 if n_experts else 6)  # no line was wrapped


def test_wide_characters_fit_too():
    view, _ = view_in_terminal(60)
    view.title = "训练 " * 30
    view.update(1, loss=1.0, note="验证损失 " * 30)
    assert {cell_len(line) for line in picture(view, 60)} == {60}


def test_a_terminal_without_unicode_and_text_that_it_cannot_show():
    view, file = view_in_terminal(encoding="ascii")
    view.title = "moe · 训练"
    with view:
        view.update(5, loss=1.0, load=[1, 2, 0], note="naïve ×2 [bold]not markup[/bold]\nsecond line")
    text = file.getvalue()  # the recorder raises where something is not ASCII
    assert "load 2x |" in text
    assert "na?ve ?2 [bold]not markup[/bold] second line" in text
    file = Recorder("ascii")
    with TrainingView(3, "moe · x", console=Console(file=file, width=80)) as view:
        view.update(1, loss=1.0)
    assert file.getvalue() == "moe ? x - step 1/3 - loss 1.000\n"


def test_a_loss_that_is_not_finite_is_shown_and_harms_nothing():
    view = filled()
    view.update(121, loss=float("nan"), eta_seconds=float("inf"))
    text = "\n".join(picture(view))
    assert "loss nan" in text
    assert "ETA       ?" in text
    assert 2.0 in view._losses


def test_loads_of_zero():
    assert "0.00× (#0) to 0.00×" in "\n".join(picture(filled(load=[0, 0, 0])))


def test_at_most_four_drawings_a_second_and_each_is_one_write():
    clock = Clock()
    view, file = view_in_terminal(clock=clock)
    with view:
        view.update(0, loss=3.0)
        file.writes.clear()
        for step in range(1, 1001):  # ten seconds at 100 steps a second
            clock.now += 0.01
            view.update(step, loss=3.0, load=[1, 2])
        frames = [text for text in file.writes if "╯" in text]
        assert 30 <= len(frames) <= 40
        # one write clears the old picture and draws the new one: nothing to flicker in between
        assert len(file.writes) == len(frames)
        assert all(text.count("╭") == 1 for text in frames)


def test_the_last_state_stays_on_the_screen():
    view, file = view_in_terminal(clock=Clock())
    with view:
        for step in range(301):
            view.update(step, loss=3.0)  # the clock stands still: only the first would be drawn
    frames = [text for text in file.writes if "╯" in text]
    assert "step 300/300" in frames[-1]


def test_an_error_passes_through_and_the_cursor_comes_back():
    view, file = view_in_terminal()

    def interrupted():
        with view:
            view.update(7, loss=3.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_plain_lines_every_ten_seconds_and_at_once_for_a_note():
    clock, file = Clock(), Recorder()
    with TrainingView(300, "moe", console=Console(file=file, width=80), clock=clock) as view:
        for step in range(1, 251):  # 31.25 seconds
            clock.now += 0.125
            view.update(step, loss=300.0 / step, tokens_per_second=6812.4, load=[1, 2], max_violation=0.12,
                        dropped_share=0.0, eta_seconds=3600 * 25 + 61,
                        note="validation" if step >= 150 else None)  # fmt: skip
    lines = file.getvalue().splitlines()
    assert [re.search(r"step (\d+)/300", line)[1] for line in lines] == ["1", "81", "150", "230", "250"]
    # longer than the console is wide, and still one line
    assert lines[2] == (
        "moe · step 150/300 · loss 2.000 · 6,812 tokens/s · max violation 0.12 · dropped 0.0% · "
        "ETA 1d 01:01 · validation"
    )
    assert "\x1b" not in file.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    view, file = view_in_terminal()
    with view:
        view.update(1, loss=1.0)
    assert file.getvalue() == "moe · step 1/300 · loss 1.000\n"


def test_two_views_in_one_terminal():
    console = Console(file=Recorder(), force_terminal=True, width=80)
    with (
        TrainingView(3, "outer", console=console) as outer,
        TrainingView(3, "inner", console=console) as inner,
    ):
        inner.update(1, loss=1.0)
        outer.update(1, loss=1.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "1d 01:01"),
     (float("nan"), "?"), (-3, "0:00")],
)  # fmt: skip
def test_durations(seconds, text):
    assert terminal._duration(seconds) == text


def test_a_view_without_updates_says_nothing_in_a_file():
    file = Recorder()
    with TrainingView(3, "moe", console=Console(file=file)):
        pass
    assert file.getvalue() == ""
