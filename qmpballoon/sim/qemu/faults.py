"""Faults of a simulated QEMU; each field may be changed while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Final


class Babble(StrEnum):
    """Invalid messages before, or in place of, a reply."""

    RANDOM_BYTES = "random-bytes"  # a line of random bytes, then the reply
    NOT_AN_OBJECT = "not-an-object"  # a line of valid JSON that is a list, then the reply
    UNKNOWN_ID = "unknown-id"  # a reply to a request that was never sent, then the reply
    ID_TWICE = "id-twice"  # the reply twice
    NO_ID = "no-id"  # the reply without its id


@dataclass(slots=True)
class Faults:
    """No fault unless set. All but the first five do not affect the negotiation.

    Commands are named as in QMP; ``*`` stands for all of them.
    """

    silent_greeting: bool = False  # accepts clients and sends nothing
    silent_after_replies: int | None = None  # on each connection, without the greeting
    reply_delay_s: float = 0.0
    cut_after_bytes: int | None = None  # closes after this many bytes
    silent_to: frozenset[str] = frozenset()
    refuse: frozenset[str] = frozenset()  # answers these with a GenericError
    half_reply_to: frozenset[str] = frozenset()  # sends half of the reply, then closes
    unplugged_after: frozenset[str] = frozenset()  # says that the balloon went, in one piece with the reply
    babble: Babble | None = None
    event_flood: int = 0  # number of events before each reply
    reply_padding: int = 0  # number of blanks inside each reply

    @classmethod
    def parse(cls, words: Iterable[str]) -> Faults:
        """Parse words ``name`` or ``name=value``: ``reply-delay-s=0.5``, ``refuse=balloon,stop``.

        Raises:
            ValueError: no such fault, or an invalid value; the message says which are valid.
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
