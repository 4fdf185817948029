"""SIGTERM and SIGHUP end a verb as Ctrl-C does: what it changed at a monitor is restored first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_ENDING: Final = (
    signal.SIGTERM,
    signal.SIGHUP,
)  # of timeout, systemctl stop, a closed session of ssh


class Ended(KeyboardInterrupt):
    """One of these signals has ended the verb."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__()


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Let the signals do what Ctrl-C does; one that is ignored, as by nohup, stays so.

    Raises:
        Ended: one of them came, and the body has ended by it.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        handler = signal.getsignal(signal.SIGINT)  # that of asyncio's runner cancels the main task
        (handler if callable(handler) else signal.default_int_handler)(number, frame)

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if received:
            raise Ended(received[0]) from None
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
