"""Text for a terminal: no control characters, colour only where it is wanted."""

from __future__ import annotations

import asyncio
import io

import pytest

from qmpballoon import terminal


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_removed_from_untrusted_text() -> None:
    assert terminal.clean("web\x1b[2J\r\n\x07\x9b\u202e1\udc80 ok") == "web?[2J?????1? ok"


def test_each_line_of_an_error_starts_with_the_program_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal.print_error("a\nb\x1b[0m")
    assert capsys.readouterr() == ("", "qmpballoon: a\nqmpballoon: b?[0m\n")


def test_colour_is_only_for_a_terminal_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.coloured("x", "red", _Terminal()) == "\x1b[31mx\x1b[0m"
    assert terminal.coloured("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.coloured("x", "red", _Terminal()) == "x"


def test_a_table_aligns_figures_right_and_names_left() -> None:
    assert terminal.table(("NAME", "SIZE"), [("a", "1 B"), ("longer", "100 MiB")]) == [
        "NAME       SIZE",
        "a           1 B",
        "longer  100 MiB",
    ]


def test_the_sizes_in_an_event_have_units() -> None:
    details = {"from": 2**20, "to": 2**21, "why": "manual", "policy": None}
    assert terminal.phrases(details) == ["from 1 MiB", "to 2 MiB", "why manual"]
    assert terminal.phrases({"from": "ok", "to": "paused"}) == ["from ok", "to paused"]
    assert terminal.phrases({"message": "gone"}) == ["gone"]


async def test_no_progress_is_shown_if_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def line(elapsed_s: float) -> str:
        raise AssertionError("the line is not needed")

    async with terminal.progress(line):
        pass
    assert capsys.readouterr().err == ""


async def test_progress_restores_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(terminal, "_PROGRESS_AFTER_S", 0.01)
    shown = asyncio.Event()

    async def line(elapsed_s: float) -> str:
        shown.set()
        return "half\x1bway"

    async with terminal.progress(line), asyncio.timeout(10):
        await shown.wait()
        while "half" not in screen.getvalue():
            await asyncio.sleep(0)
    assert "half?way" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")
