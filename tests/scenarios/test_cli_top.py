"""`top` on the command line: what it needs, wrong options, and a terminal that is left as it was."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from qmpballoon.cli import main
from qmpballoon.cli import top as top_module
from qmpballoon.cli.top import explained
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]
PATIENCE_S = 60.0
NOBODY = "mqtt://127.0.0.1:9"


def test_without_textual_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["top", "--broker", NOBODY]) == 2
    assert capsys.readouterr().err == (
        "qmpballoon: top needs Textual, which is not installed: "
        f"{sys.executable} -m pip install 'qmpballoon[top]'\n"
    )


def test_without_a_terminal_it_names_what_a_program_would_use(capsys: Capture) -> None:
    assert main(["top", "--broker", NOBODY]) == 2
    assert "top needs a terminal; for a program: qmpballoon ctl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ([], "no broker is named"),
        (["--broker", "http://x"], "mqtt"),
        (["--broker", NOBODY, "--username", "x", "--password-file", "/no/such/file"], "/no/such/file"),
        (["--theme", "blue"], "invalid choice"),
    ],
)
def test_what_is_wrong_is_said_before_the_screen_is_taken(
    typed: list[str], reason: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QMPBALLOON_BROKER", raising=False)
    assert main(["top", *typed]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "light"), [("0;15", True), ("0;default;7", True), ("15;0", False), ("", False)]
)
def test_the_background_is_that_of_the_terminal(
    value: str, light: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLORFGBG", value)
    assert top_module._has_light_background() is light


def test_decisions_are_explained_the_newest_first_below_what_is_in_force() -> None:
    decisions = [
        {"ts": f"2026-11-27T16:30:0{number}Z", "why": "grow", "to": number * MIB, "figures": {"actual": MIB}}
        for number in (2, 3)
    ]
    lines = explained({"name": "web1", "why": "grow", "mode": "auto", "decisions": decisions}, 80)
    text = "\n".join(lines)
    assert text.index("now ") < text.index("-> 3 MiB") < text.index("-> 2 MiB")
    assert explained({}, 80)


class Terminal:
    """A terminal of 80 columns and 24 rows, and the program in it."""

    def __init__(self, *typed: str) -> None:
        self.output = b""
        self._fd, inside = pty.openpty()
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.program = subprocess.Popen(
            [sys.executable, "-m", "qmpballoon", "top", *typed],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "PYTHONASYNCIODEBUG": ""},
        )
        os.close(inside)

    @property
    def text(self) -> str:
        """What was written, without the sequences that place and colour it."""
        return re.sub(r"\x1b\[[0-9;?<>=]*[A-Za-z]", "", self.output.decode(errors="replace"))

    def until(self, text: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while text not in self.text:
            assert time.monotonic() < deadline_s, self.text
            assert self._read(), self.text

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def ended(self) -> int:
        """Wait for the end; return the exit code."""
        while self._read():
            pass
        os.close(self._fd)
        return self.program.wait(timeout=PATIENCE_S)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._fd], [], [], PATIENCE_S)
        assert ready, self.text
        try:
            read = os.read(self._fd, 65536)
        except OSError:  # the other end was closed
            return False
        self.output += read
        return bool(read)


@pytest.mark.parametrize(
    ("ends", "code"),
    [("q", 0), (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
    ids=["q", "SIGTERM", "SIGINT", "SIGHUP"],
)
def test_the_terminal_is_restored_however_it_ends(ends: str | signal.Signals, code: int) -> None:
    terminal = Terminal("--broker", NOBODY)
    terminal.until("Not connected yet")
    if isinstance(ends, str):
        terminal.type(ends)
    else:
        terminal.program.send_signal(ends)
    assert terminal.ended() == code
    assert b"\x1b[?1049l" in terminal.output
    assert b"\x1b[?25h" in terminal.output
    assert "Traceback" not in terminal.text


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("secret-word\n")
    password.chmod(0o600)
    terminal = Terminal("--broker", NOBODY, "--username", "me", "--password-file", str(password))
    terminal.until("Not connected yet")
    terminal.type("q")
    assert terminal.ended() == 0
    assert "secret-word" not in terminal.text
