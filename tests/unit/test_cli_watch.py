"""`watch`: a loss and an interrupt at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from qmpballoon.api import Vm
from qmpballoon.cli.watch import _Output, _Watch
from qmpballoon.errors import ConnectionLost
from qmpballoon.model.records import Event, GuestStats, VmState
from qmpballoon.units import MIB


class LosingVm:
    """A VM whose connection is lost when ``lost`` is set."""

    path = "/run/a.qmp"

    def __init__(self) -> None:
        self.lost = asyncio.Event()

    async def events(self) -> AsyncIterator[Event]:
        await self.lost.wait()
        raise ConnectionLost("gone")
        yield

    async def state(self, **_: Any) -> VmState:
        await self.lost.wait()
        raise ConnectionLost("gone")


@pytest.mark.parametrize("turns", range(8))
async def test_a_loss_at_the_time_of_an_interrupt_does_not_hide_it(turns: int) -> None:
    vm = LosingVm()
    watch = _Watch(vm.path, 1.0, _Output(as_json=True, width=1))
    task = asyncio.create_task(watch._until_lost(cast("Vm", vm)), name="watch")
    for _ in range(3):
        await asyncio.sleep(0)
    vm.lost.set()
    for _ in range(turns):  # one iteration of the loop more per case
        await asyncio.sleep(0)
    had_ended = task.done()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() is not had_ended
    if had_ended:
        assert isinstance(task.exception(), ConnectionLost)


def printed(
    columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **what: Any
) -> list[str]:
    """Return the lines of one event on a terminal of so many columns; None: no terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: columns is not None)
    _Output(as_json=False, width=4).print("web1", "/run/web1.qmp", **what)
    return capsys.readouterr().out.splitlines()


STATE = VmState(
    "paused",
    256 * MIB,
    180 * MIB,
    None,
    GuestStats(available=70 * MIB, free=60 * MIB, caches=2 * MIB),
    110 * MIB,
)
FIGURES: dict[str, Any] = {"word": "stats", "details": {"rss": 190 * MIB}, "of": STATE}


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, ["actual", "available", "free", "caches", "rss", "paused"]),
        (120, ["actual", "available", "free", "rss", "paused"]),
        (90, ["actual", "available", "paused"]),
        (70, ["actual", "paused"]),
        (50, ["actual"]),
        (None, ["actual", "available", "free", "caches", "rss", "paused"]),
    ],
)
def test_figures_that_do_not_fit_the_terminal_are_left_out(
    columns: int | None,
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (line,) = printed(columns, monkeypatch, capsys, **FIGURES)
    assert columns is None or len(line) <= columns
    words = ("actual", "available", "free", "caches", "rss", "paused")
    assert [word for word in words if word in line] == shown


def test_an_event_that_does_not_fit_the_terminal_goes_on_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "the monitor is held by another client, " * 4
    what = {"word": "busy", "details": {"message": message}}
    lines = printed(60, monkeypatch, capsys, **what)
    assert len(lines) > 3
    assert all(len(line) <= 60 for line in lines)
    assert " ".join(" ".join(lines).split()[3:]) == message.strip()
    assert len(printed(None, monkeypatch, capsys, **what)) == 1
