"""The agent's event loop: uvloop's where it is installed, otherwise asyncio's."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Final

from qmpballoon.log import log_event

_COLLECTED: Final = (10_000, 20, 20)  # CPython's defaults are 700, 10, 10
_STARTING: Final = (500_000, 20, 20)  # more than a few hundred VMs make while they attach
_STARTING_S: Final = 3.0
_UNUSABLE: Final = (
    ImportError,  # no wheel for this machine (armv7l, riscv64), or a library that does not load
    AttributeError,  # a Python version that it does not support
    DeprecationWarning,  # the same, where warnings are errors
    OSError,
    SystemError,  # an extension module that cannot be initialised
)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the factory of the agent's event loop; log it if uvloop cannot be used."""
    try:
        import uvloop
    except _UNUSABLE as error:
        log_event(
            "asyncio-loop",
            "uvloop cannot be used: asyncio's own loop serves, at some more processor time",
            reason=error,
        )
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def collect_seldom(loop: asyncio.AbstractEventLoop) -> None:
    """Run the garbage collector less often, and not while the first VMs attach.

    Hardly anything here is part of a cycle. Every VM that attaches makes some hundred objects, and each
    collection looks at all that are new. Together that took a tenth of the time of attaching.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_STARTING)
    loop.call_later(_STARTING_S, gc.set_threshold, *_COLLECTED)
