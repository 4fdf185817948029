"""Faults that a simulated QEMU shows on demand; every field may be changed while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final


class Babble(StrEnum):
    """What it sends before, or instead of, a reply."""

    RANDOM_BYTES = "random-bytes"  # a line of them, then the reply
    NOT_AN_OBJECT = "not-an-object"  # a line of valid JSON that is a list, then the reply
    UNKNOWN_ID = "unknown-id"  # a reply to a request that was never sent, then the reply
    ID_TWICE = "id-twice"  # the reply, and the reply again
    NO_ID = "no-id"  # the reply without its id


@dataclass(slots=True)
class Faults:
    """No fault unless set. All but the first five do not affect the negotiation.

    Commands are named as in QMP; ``*`` stands for all of them.
    """

    silent_greeting: bool = False  # accepts and sends nothing
    silent_after_replies: int | None = None  # of one connection, the greeting not counted
    reply_delay_s: float = 0.0
    cut_after_bytes: int | None = None  # sends so many bytes in all, then closes
    silent_to: frozenset[str] = frozenset()
    refuse: frozenset[str] = frozenset()  # answers these with a GenericError
    half_reply_to: frozenset[str] = frozenset()  # sends half of the reply, then closes
    babble: Babble | None = None
    event_flood: int = 0  # so many events in front of every reply
    reply_padding: int = 0  # bytes of blanks inside every reply

    @classmethod
    def parse(cls, words: Iterable[str]) -> Faults:
        """Read ``name`` or ``name=value`` each, as typed: ``reply-delay-s=0.5``, ``refuse=balloon,stop``.

        Raises:
            ValueError: no such fault, or a value that does not fit; the message lists what is possible.
        """
        faults = cls()
        for word in words:
            name, given, value = word.partition("=")
            kind = _KINDS.get(name)
            if kind is None:
                raise ValueError(f"no fault {name!r}; there are {', '.join(_KINDS)}")
            if bool(given) == (kind == "bool"):
                raise ValueError(f"{name} takes {'no' if kind == 'bool' else 'a'} value")
            parsed: object
            try:
                if kind == "bool":
                    parsed = True
                elif kind.startswith("int"):
                    parsed = int(value)
                elif kind == "float":
                    parsed = float(value)
                elif kind.startswith("Babble"):
                    parsed = Babble(value)
                else:
                    parsed = frozenset(value.split(","))
            except ValueError:
                raise ValueError(f"{name} does not take {value!r}") from None
            setattr(faults, name.replace("-", "_"), parsed)
        return faults


def concerns(commands: frozenset[str], command: str) -> bool:
    """Tell whether a fault's commands include this one."""
    return command in commands or ("*" in commands and command != "qmp_capabilities")


_KINDS: Final = {field.name.replace("_", "-"): str(field.type) for field in fields(Faults)}
