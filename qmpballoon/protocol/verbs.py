"""The verbs that may be asked for over MQTT, with their arguments, types and ranges. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from qmpballoon.errors import QmpBalloonError, RequestRefused
from qmpballoon.model.records import MODES, POLICIES
from qmpballoon.protocol.payloads import Content
from qmpballoon.units import Amount, parse_amount

Scope: TypeAlias = Literal["vm", "host"]
Reader: TypeAlias = Callable[[str, object], object]

LONGEST_WAIT_S: Final = 600.0
LONGEST_HOLD_S: Final = 86400.0
LONGEST_MODE_S: Final = 31 * 86400.0
MOST_SHARES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Argument:
    """How one argument is read. ``keeps_null``: null has a meaning of its own, else it means absent."""

    read: Reader
    required: bool = False
    keeps_null: bool = False


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb's arguments; ``bare`` is the one that may stand alone; ``some``: at least one is needed."""

    arguments: Mapping[str, Argument]
    bare: str | None = None
    some: bool = False


def _size(name: str, value: object) -> Amount:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _malformed(f"{name} is a size: a number of bytes or text like 512MiB")
    return parse_amount(value)


def _seconds(lowest: float, highest: float) -> Reader:
    def read(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _malformed(f"{name} is a number of seconds")
        if not lowest <= value <= highest:
            raise RequestRefused("out-of-range", f"{name} is from {lowest:g} to {highest:g} seconds")
        return float(value)

    return read


def _shares(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise _malformed(f"{name} is a whole number")
    if not 1 <= value <= MOST_SHARES:
        raise RequestRefused("out-of-range", f"{name} is from 1 to {MOST_SHARES}")
    return int(value)


def _word(words: tuple[str, ...]) -> Reader:
    def read(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise _malformed(f"{name} is one of {', '.join(words)}{_did_you_mean(value, words)}")
        return value

    return read


def _hold(name: str, value: object) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not 0 < len(text) <= 64 or not text.isprintable():
        raise _malformed(f"{name} is the word that reclaim answered")
    return text


_NOTHING: Final = Verb(MappingProxyType({}))

VERBS: Final[Mapping[Scope, Mapping[str, Verb]]] = MappingProxyType(
    {
        "vm": MappingProxyType(
            {
                "set-target": Verb(
                    {
                        "target": Argument(_size, required=True),
                        "wait_s": Argument(_seconds(0, LONGEST_WAIT_S)),
                    },
                    bare="target",
                ),
                "set-mode": Verb(
                    {
                        "mode": Argument(_word(MODES), required=True),
                        "for_s": Argument(_seconds(1, LONGEST_MODE_S)),
                    },
                    bare="mode",
                ),
                "set-limits": Verb(
                    {
                        "floor": Argument(_size, keeps_null=True),
                        "ceiling": Argument(_size, keeps_null=True),
                        "shares": Argument(_shares, keeps_null=True),
                    },
                    some=True,
                ),
                "get": _NOTHING,
                "doctor": _NOTHING,
            }
        ),
        "host": MappingProxyType(
            {
                "list": _NOTHING,
                "reclaim": Verb(
                    {
                        "size": Argument(_size, required=True),
                        "deadline_s": Argument(_seconds(0, LONGEST_WAIT_S)),
                        "hold_s": Argument(_seconds(0, LONGEST_HOLD_S)),
                    },
                    bare="size",
                ),
                "release": Verb({"hold": Argument(_hold, required=True)}, bare="hold"),
                "set-policy": Verb(
                    {"name": Argument(_word(POLICIES)), "mode": Argument(_word(MODES))},
                    bare="name",
                    some=True,
                ),
                "reload": _NOTHING,
            }
        ),
    }
)


def validate(verb: str, scope: Scope, content: Content) -> Mapping[str, object]:
    """Return a request's arguments, read and in range; one that was not given is not in it.

    A size is an `Amount` (who knows the size resolves a percentage), seconds are floats, words are
    text. In ``set-limits`` None takes an override back.

    Raises:
        RequestRefused: ``unknown-verb``, ``malformed`` or ``out-of-range``.
    """
    known = VERBS[scope].get(verb)
    if known is None:
        raise RequestRefused("unknown-verb", _unknown_verb(verb, scope))
    given = content.arguments
    if given is None:
        if known.bare is None:
            raise _malformed(f"{verb} takes {_list(known.arguments)}: send an object such as {{}}")
        given = {known.bare: content.bare}
    for name in given:
        if name not in known.arguments:
            hint = _did_you_mean(name, known.arguments)
            raise _malformed(f"{verb} has no argument {name[:64]!r}{hint}: it takes {_list(known.arguments)}")
    arguments: dict[str, object] = {}
    for name, argument in known.arguments.items():
        value = given.get(name)
        if value is not None:
            arguments[name] = _read(argument, name, value)
        elif argument.required:
            raise _malformed(f"{verb} needs {name}")
        elif argument.keeps_null and name in given:
            arguments[name] = None
    if known.some and not arguments:
        raise _malformed(f"{verb} needs at least one of {_list(known.arguments)}")
    return MappingProxyType(arguments)


def _read(argument: Argument, name: str, value: object) -> object:
    try:
        return argument.read(name, value)
    except RequestRefused:
        raise
    except QmpBalloonError as error:
        raise RequestRefused(error.code, f"{name}: {error}") from None


def _unknown_verb(verb: str, scope: Scope) -> str:
    other: Scope = "host" if scope == "vm" else "vm"
    if verb in VERBS[other]:
        asked = {"host": "the host", "vm": "a VM"}
        return f"{verb} is asked of {asked[other]}, not of {asked[scope]}"
    return f"no verb {verb[:64]!r}{_did_you_mean(verb, VERBS[scope])}: there are {_list(VERBS[scope])}"


def _did_you_mean(word: object, words: Mapping[str, object] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(word)[:64], list(words), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _list(words: Mapping[str, object]) -> str:
    return ", ".join(words) or "no arguments"


def _malformed(reason: str) -> RequestRefused:
    return RequestRefused("malformed", reason)
