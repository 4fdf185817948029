"""Requests whose callers wait for the replies, by their ids. No I/O."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Final, NamedTuple, TypeAlias

from qmpballoon.errors import QmpError

MOST_ABANDONED: Final = 256  # outstanding replies to cancelled requests


class Asked(NamedTuple):
    """A command and its arguments."""

    command: str
    arguments: Mapping[str, object] | None = None


Reply: TypeAlias = "asyncio.Future[Mapping[str, object] | None]"
"""What QEMU answered; None: the session ended."""


class Waiting:
    """The requests of one session that wait for their replies."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._serial = 0
        self._replies: dict[int, Reply] = {}
        self._abandoned: set[int] = set()

    def __len__(self) -> int:
        """Return how many replies are to come, also those that nobody waits for any more."""
        return len(self._replies) + len(self._abandoned)

    def new_id(self) -> int:
        """Return an id that no request of the session has."""
        self._serial += 1
        return self._serial

    def add(self, asked: Sequence[Asked]) -> tuple[bytes, dict[int, str], list[Reply]]:
        """Add requests; return what has to be sent, their commands by id, and their replies."""
        lines: list[str] = []
        named: dict[int, str] = {}
        for command, arguments in asked:
            key = self.new_id()
            named[key] = command
            lines.append(f'{{"id": {key}, {body_of(command, arguments)}}}\n')  # for those who read lines
            self._replies[key] = self._loop.create_future()
        return "".join(lines).encode(), named, [self._replies[key] for key in named]

    def takes(self, message: Mapping[str, object]) -> bool:
        """Take a reply; return whether it was to come."""
        key = message.get("id")
        if type(key) is not int:
            return False
        reply = self._replies.pop(key, None)
        if reply is not None:
            if not reply.done():
                reply.set_result(message)
            return True
        if key not in self._abandoned:
            return False
        self._abandoned.remove(key)
        return True

    def abandon(self, keys: Iterable[int]) -> bool:
        """Drop the replies that are still to come; return whether too many of the session are missing."""
        missing = [key for key in keys if self._replies.pop(key, None) is not None]
        self._abandoned.update(missing)
        return bool(missing) and len(self._abandoned) > MOST_ABANDONED

    def first_missing(self, named: Mapping[int, str]) -> str | None:
        """Return the command of the first of these requests whose reply is to come; None: all are there."""
        return next((command for key, command in named.items() if key in self._replies), None)

    def end(self) -> None:
        """Tell all who wait that the session ended."""
        for reply in self._replies.values():
            if not reply.done():
                reply.set_result(None)
        self._replies.clear()


def body_of(command: str, arguments: Mapping[str, object] | None) -> str:
    """Return a request as JSON, without its id and the brackets; values of arguments are hashable."""
    return _body_of(command, arguments is None, *chain.from_iterable((arguments or {}).items()))


@lru_cache(maxsize=256, typed=True)  # the requests to many VMs are the same
def _body_of(command: str, is_alone: bool, *arguments: object) -> str:
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return f'"execute": {json.dumps(command)}' + ("" if is_alone else f', "arguments": {json.dumps(given)}')


def returned(answer: object | QmpError) -> object:
    """Return what a command returned.

    Raises:
        QmpError: QEMU refused it.
    """
    if isinstance(answer, QmpError):
        raise answer
    return answer


def refusal(command: str, reply: Mapping[str, object]) -> QmpError:
    """Return the error that a reply without ``return`` is.

    Raises:
        TypeError: it has no error either.
    """
    error = reply.get("error")
    if not isinstance(error, Mapping):
        raise TypeError(f"the reply to {command} has neither return nor error")
    return QmpError(command, str(error.get("class"))[:64], str(error.get("desc"))[:500])
