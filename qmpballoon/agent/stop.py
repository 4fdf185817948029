"""A stop of the agent: the signals that ask for it, the exit code, and the time in which the process ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import Any, Final

from qmpballoon.log import log_event

STOP_WITHIN_S: Final = 10.0  # from the first signal to the end of the process
_LOGGED_WITHIN_S: Final = 0.2  # then the log is blocked, too


class Stop:
    """Ends the agent cleanly on the first SIGTERM or Ctrl-C, and the process after STOP_WITHIN_S in any case.

    `ask` does the same without a signal.

    A second of these signals has its default action: it ends the process at once, even if the loop hangs. The
    handlers are Python's and not the loop's, for the same reason: the bound holds while the loop is blocked.
    """

    def __init__(self) -> None:
        self.asked_for = asyncio.Event()
        self.exit_code = 0
        self._loop = asyncio.get_running_loop()
        self._is_asked = False
        self._bounded: SimpleQueue[None] = SimpleQueue()  # its ``put`` may be called in a signal handler

    @contextmanager
    def on_signals(self, reload: Callable[[], None]) -> Iterator[None]:
        """Take SIGTERM, SIGINT and SIGHUP, which calls ``reload`` in the loop until a stop is asked for.

        After a stop the handlers stay as they are until the process ends.
        """
        threading.Thread(target=self._end_in_time, name="bound of a stop", daemon=True).start()

        def hang_up(number: int, frame: FrameType | None) -> None:
            self._loop.call_soon_threadsafe(self._unless_asked, reload)

        handlers: dict[signal.Signals, Any] = {signal.SIGTERM: self._ask, signal.SIGHUP: hang_up}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job ignores it
            handlers[signal.SIGINT] = self._ask
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            if not self._is_asked:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def ask(self) -> None:
        """Ask for a clean stop, as SIGTERM does."""
        self._ask(signal.SIGTERM, None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        if number == signal.SIGINT:
            self.exit_code = 128 + number  # as shells have it
        for stopping in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(stopping) is not signal.SIG_IGN:
                signal.signal(stopping, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._bounded.put(None)
        self._loop.call_soon_threadsafe(self.asked_for.set)

    def _unless_asked(self, reload: Callable[[], None]) -> None:
        if not self._is_asked:
            reload()

    def _end_in_time(self) -> None:
        self._bounded.get()
        time.sleep(STOP_WITHIN_S)
        threading.Thread(target=self._log_the_end, name="log of a stop", daemon=True).start()
        time.sleep(_LOGGED_WITHIN_S)
        os._exit(self.exit_code)

    def _log_the_end(self) -> None:
        log_event(
            "stop-forced",
            f"the stop was not complete after {STOP_WITHIN_S:g} s; balloons stay as they are",
            level=logging.ERROR,
        )
