"""A blocking call in a thread of its own, for which the end of the process does not wait.

asyncio's default executor is not used: the end of the loop and of the interpreter wait for its threads, and a
look-up of a name may take a minute. Writing the state file needs that executor, too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

MOST_THREADS: Final = 8  # calls that were given up may last until the resolver does

_free = threading.BoundedSemaphore(MOST_THREADS)


async def in_own_thread(call: Callable[[], None], *, name: str) -> None:
    """Wait for ``call()`` in a daemon thread; a cancelled wait leaves the thread to end by itself.

    Raises:
        OSError: MOST_THREADS earlier calls have not returned yet, or no thread can be started.
    """
    loop = asyncio.get_running_loop()
    returned: asyncio.Future[None] = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if returned.done():
            return
        if error is None:
            returned.set_result(None)
        else:
            returned.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            call()
        except BaseException as raised:  # noqa: BLE001  # raised where it is waited for
            error = raised
        finally:
            _free.release()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, error)

    if not _free.acquire(blocking=False):
        raise OSError(f"{MOST_THREADS} earlier attempts still wait, probably for the name server")
    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:
        _free.release()
        raise OSError(str(error)) from None
    await returned
