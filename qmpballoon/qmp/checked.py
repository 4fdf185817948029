"""Parts of what QEMU answered, of their documented form.

Each function raises ConnectionLost for another one.
"""

from __future__ import annotations

from collections.abc import Mapping

from qmpballoon.errors import ConnectionLost
from qmpballoon.qmp.client import Session
from qmpballoon.units import MAX_SIZE


def fields_of(session: Session, answer: object) -> Mapping[str, object]:
    """Return an object."""
    if not isinstance(answer, dict):
        raise ConnectionLost(f"{session.path}: QEMU returned {str(answer)[:80]!r} where an object belongs")
    return answer


def rows_of(session: Session, answer: object) -> list[Mapping[str, object]]:
    """Return a list of objects."""
    if not isinstance(answer, list):
        raise ConnectionLost(f"{session.path}: QEMU returned {str(answer)[:80]!r} where a list belongs")
    return [fields_of(session, row) for row in answer]


def size_of(session: Session, value: object) -> int:
    """Return a number of 0 to 2**53: bytes, mostly."""
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise ConnectionLost(f"{session.path}: QEMU returned {str(value)[:80]!r} where a number belongs")
    return value
