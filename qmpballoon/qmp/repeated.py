"""Requests that are sent again and again, and whose replies are mostly the same bytes as the one before.

Such a request is made once. A reply that is the same is recognised without decoding it. No I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, Protocol, TypeAlias

from qmpballoon.errors import QmpError
from qmpballoon.qmp.asked import body_of, refusal

Numbers: TypeAlias = tuple[int | None, ...]
"""One for each volatile key, in their order; None: it is absent, not unique, or no usual number."""


class Sink(Protocol):
    """Takes the replies to a repeated request. Every call must return at once."""

    def same(self, numbers: Numbers) -> None:
        """The reply is the one before, but for the numbers under the volatile keys."""

    def changed(self, result: object) -> None:
        """The reply is another one, or the first; ``result`` is what QEMU returned."""

    def refused(self, error: QmpError) -> None:
        """QEMU refused the request, and did not before; if it does so again, that is the same."""


class Repeated:
    """One such request, with its id ``key``.

    ``volatile`` are the keys of numbers that change in replies that are otherwise the same.
    """

    __slots__ = ("_first", "_last", "_order", "_rest", "_sink", "_volatile", "command", "key", "request")

    def __init__(
        self,
        key: str,
        command: str,
        arguments: Mapping[str, object] | None,
        sink: Sink,
        *,
        volatile: Sequence[str] = (),
    ) -> None:
        self.key = key
        self.command = command
        self.request = _line(key, body_of(command, arguments))
        self._sink = sink
        self._volatile = _keys(tuple(volatile))
        self._last: int | None = None  # the hash of the last reply: some are kilobytes
        self._order: list[int] = []  # of the volatile numbers in the last reply
        self._first = b""  # what comes before the first of them
        self._rest: list[bytes] = []  # what follows each of them

    def takes_same(self, line: bytes) -> bool:
        """Take a reply if it is the same as the last one; return whether it was."""
        if not self._order:
            if hash(line) != self._last:
                return False
            self._sink.same((None,) * len(self._volatile))
            return True
        if not line.startswith(self._first) or not line.endswith(self._rest[-1]):
            return False
        numbers: list[int | None] = [None] * len(self._volatile)
        start, limit = len(self._first), len(line) - len(self._rest[-1])
        for which, after in zip(self._order, self._rest, strict=True):
            end = limit if after is self._rest[-1] else line.find(after, start, limit)
            number = line[start:end]
            if end < 0 or not number.isdigit() or len(number) > _MOST_DIGITS:
                return False
            numbers[which] = int(number)
            start = end + len(after)
        self._sink.same(tuple(numbers))
        return True

    def take(self, line: bytes, reply: Mapping[str, object]) -> None:
        """Take a reply that is not the same as the last one."""
        self._last = hash(line)
        self._order, pieces, start = [], [], 0
        found = ((line.find(name), name, which) for which, name in enumerate(self._volatile))
        for at, name, which in sorted(each for each in found if line.count(each[1]) == 1):
            begin = at + len(name)
            end = _end_of_number(line, begin)
            if 0 < end - begin <= _MOST_DIGITS and line[end : end + 1] in (b",", b"}"):
                self._order.append(which)
                pieces.append(line[start:begin])
                start = end
        self._first, *self._rest = (*pieces, line[start:]) if pieces else (b"",)
        if "return" in reply:
            self._sink.changed(reply["return"])
        else:
            self._sink.refused(refusal(self.command, reply))


class Outstanding:
    """The requests whose replies are to come, in the order of the replies."""

    def __init__(self) -> None:
        self.since_s = 0.0  # when the first of them was sent
        self._requests: list[Repeated] = []

    @property
    def command(self) -> str | None:
        """The command whose reply comes next; None: none is to come."""
        return self._requests[0].command if self._requests else None

    def add(self, requests: Sequence[Repeated], now_s: float) -> bytes:
        """Add requests; return what has to be sent."""
        if not self._requests:
            self.since_s = now_s
        self._requests.extend(requests)
        return b"".join([request.request for request in requests])

    def takes_same(self, line: bytes) -> bool:
        """Take a reply if it is the next one and the same as before; return whether it is."""
        if not self._requests or not self._requests[0].takes_same(line):
            return False
        self._requests.pop(0)
        return True

    def takes(self, line: bytes, reply: Mapping[str, object]) -> bool:
        """Take a reply if it is the next one; return whether it is.

        Raises:
            TypeError: it has neither return nor error.
        """
        if not self._requests or reply.get("id") != self._requests[0].key:
            return False
        self._requests.pop(0).take(line, reply)
        return True

    def clear(self) -> None:
        """Expect no replies any more."""
        self._requests.clear()


_MOST_DIGITS: Final = 15  # what is larger is decoded, and checked


@lru_cache(maxsize=256)
def _line(key: str, body: str) -> bytes:
    """Return a request's line, one for all sessions: they are mostly the same."""
    return f'{{"id": {json.dumps(key)}, {body}}}\n'.encode()


@lru_cache(maxsize=16)
def _keys(names: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(f'"{name}": '.encode() for name in names)


def _end_of_number(line: bytes, start: int) -> int:
    end = start
    while line[end : end + 1].isdigit():
        end += 1
    return end
