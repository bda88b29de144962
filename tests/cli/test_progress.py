"""The progress of a run: a bar on a terminal, lines elsewhere, and colours only where they are wanted."""

import io
import re
import sys

import pytest

from subspan.training.monitor.progress import ProgressLine, duration

COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-9]|9[0-7]|38;[0-9;]*)m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **environment: str) -> str:
    """Return what a run of four steps writes."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressLine(4, 0) as progress:
        for step in range(1, 5):
            progress.note(2.5, 1234.5)
            progress.update(step)
            progress.say(f"step {step}: validation loss 2.4")
    return stream.getvalue()


def test_a_terminal_has_a_bar_in_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal())
    assert COLOUR.search(text)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert re.search(r"4/4 loss 2\.500 +1,234 tokens/s 0:00:00", plain)


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), NO_COLOR="1")
    assert "4/4" in text
    assert not COLOUR.search(text)


@pytest.mark.parametrize(
    ("stream", "environment"), [(io.StringIO, {}), (io.StringIO, {"FORCE_COLOR": "1"}), (Terminal, {"TERM": "dumb"})]
)
def test_lines_elsewhere(
    stream: type[io.StringIO], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines hold steps, loss, tokens per second and the time left, and no code of any kind."""
    text = shown(monkeypatch, stream(), **environment)
    assert "\x1b" not in text
    assert "\r" not in text
    lines = [line for line in text.splitlines() if "validation" not in line]
    assert [line.partition("  ")[0] for line in lines] == [f"step {step}/4" for step in (1, 2, 3, 4)]
    assert re.fullmatch(r"step 1/4  loss 2\.500  1,234 tokens/s  \d+ s left", lines[0])
    assert lines[3].endswith("tokens/s")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99.4, "99 s"), (119, "2 min"), (5940, "99 min"), (6100, "1.7 h"), (360_000, "100.0 h")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words
