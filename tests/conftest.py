"""What all tests share: asyncio in debug mode, a Ctrl-C that is heard, also in programs, and short paths."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["PYTHONASYNCIODEBUG"] = "1"  # read by asyncio whenever it makes a loop
os.environ["QMPBALLOON_CONTROL"] = ""  # no verb asks an agent that happens to run on this machine
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Undo what a command did to the log: it writes to the stream that was stderr at that time."""
    loggers = [logging.getLogger(name) for name in ("qmpballoon", "asyncio")]
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]
    hook = sys.excepthook
    yield
    sys.excepthook = hook
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture
def sockets_dir() -> Iterator[Path]:
    """A directory with a short name, removed afterwards: the path of a unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="qb-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a session send what the table of commands does not name, to peers that are made up."""
    monkeypatch.setattr("qmpballoon.qmp.commands.check", lambda *_: None)
