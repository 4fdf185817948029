"""An event loop on a thread of its own, for blocking callers; it works where a loop runs, too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, Final, Self, TypeVar

T = TypeVar("T")

_STOPS_S: Final = 30.0  # for what was cancelled to end
_LOOK_S: Final = 1.0  # whether the thread is still there


class LoopClosed(Exception):
    """The loop was closed; nothing runs on it any more."""


class LoopThread:
    """Runs coroutines on its own thread and waits for them; as a context manager, or until `close`.

    The loop is the one that the event loop policy makes: that of asyncio, or uvloop where it is installed as
    policy. The thread does not keep the interpreter from ending.
    """

    def __init__(self, name: str) -> None:
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._over: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._loop = self._ready.result()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the thread and wait for its end; return what it returns, raise what it raises.

        If the wait is interrupted, the coroutine is cancelled; the loop stays usable.

        Raises:
            LoopClosed: the thread has ended, or ends meanwhile.
            RuntimeError: called on the thread itself, where it would wait for ever.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a blocking call within another one, such as in the condition of wait_for")
        try:
            outcome = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise LoopClosed from None
        try:
            while not wait((outcome,), _LOOK_S).done:
                if not self._thread.is_alive():
                    coroutine.close()  # the loop ended before it began
                    raise LoopClosed
            return outcome.result()
        except CancelledError:
            raise LoopClosed from None
        finally:
            outcome.cancel()

    def close(self) -> None:
        """Cancel what runs, close the loop and wait until the thread has ended; may be called again."""
        try:
            self._loop.call_soon_threadsafe(self._stop)
        except RuntimeError:
            return  # closed already
        self._thread.join(_STOPS_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── on the thread ────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._serve())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        self._ready.set_result(asyncio.get_running_loop())
        await self._over.wait()

    def _stop(self) -> None:
        if self._over is not None:
            self._over.set()
