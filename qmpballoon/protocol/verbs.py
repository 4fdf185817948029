"""The verbs of requests: one frozen record each, with the types and ranges of its arguments. Pure.

The fields of a record are the verb's arguments. A missing argument is None.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias, get_args

from qmpballoon.errors import RequestRefused
from qmpballoon.model.records import MODES, POLICIES
from qmpballoon.policy.decided import MOST_KEPT
from qmpballoon.readers import (
    Path,
    Reader,
    Reading,
    Wrong,
    amount,
    described,
    did_you_mean,
    dotted,
    number,
    schema_of,
    shown,
    text,
    unknown_key,
    whole,
    word,
)
from qmpballoon.units import Amount

if TYPE_CHECKING:
    from qmpballoon.protocol.payloads import Content

Scope: TypeAlias = Literal["vm", "host"]

LONGEST_WAIT_S: Final = 600.0
LONGEST_HOLD_S: Final = 86400.0
LONGEST_MODE_S: Final = 31 * 86400.0
MOST_SHARES: Final = 1_000_000
DEADLINE_S: Final = 30.0  # of a verb that is given no ``deadline_s``


class TakeBack(Enum):
    """What null means in ``set-limits``: the file's value is in force again."""

    TAKE_BACK = "take back"


TAKE_BACK: Final = TakeBack.TAKE_BACK


def _required(read: Reader, *, bare: bool = False) -> Any:
    """Make a required argument; a ``bare`` one may be sent alone, without its name."""
    return field(metadata={"read": read, "bare": bare})


def _optional(read: Reader, *, bare: bool = False) -> Any:
    return field(default=None, metadata={"read": read, "bare": bare})


def _limit(read: Reader) -> Any:
    """Make an argument for which null means TAKE_BACK; for other arguments null means absent."""
    return field(default=None, metadata={"read": read, "bare": False, "null": TAKE_BACK})


def _hold(value: object) -> str:
    named = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    try:
        return str(text(64)(named))
    except Wrong:
        raise Wrong("must be the hold that reclaim returned") from None


def _target(value: object) -> Amount:
    mode = value.strip().lower() if isinstance(value, str) else ""
    if mode not in MODES:
        return amount(value)
    also = "; on target/set the word is auto, in small letters" if mode == "auto" else ""
    raise Wrong(f"{shown(value)} is a mode and no size: request set-mode with {mode}{also}")


described(_target, **schema_of(amount))
described(_hold, type=["string", "integer"], minLength=1, maxLength=64)

_wait: Final = number(0, LONGEST_WAIT_S, "seconds")


class _Verb:
    __slots__ = ()
    VERB: ClassVar[str]
    NEEDS_SOME: ClassVar[bool] = False  # at least one argument, any of them
    ENDS_WITH_ASKER: ClassVar[bool] = False  # it is undone if the transport sees that the asker is gone


@dataclass(frozen=True, slots=True)
class SetTarget(_Verb):
    """Set a manual target; answered at once, or with ``wait_s`` when the target is reached."""

    VERB = "set-target"
    target: Amount = _required(_target, bare=True)
    wait_s: float | None = _optional(_wait)


@dataclass(frozen=True, slots=True)
class SetMode(_Verb):
    """Set the mode of a VM, permanently or for ``for_s`` seconds."""

    VERB = "set-mode"
    mode: str = _required(word(*MODES), bare=True)
    for_s: float | None = _optional(number(1, LONGEST_MODE_S, "seconds"))


@dataclass(frozen=True, slots=True)
class SetLimits(_Verb):
    """Override limits of a VM, or remove overrides."""

    VERB = "set-limits"
    NEEDS_SOME = True
    floor: Amount | TakeBack | None = _limit(amount)
    ceiling: Amount | TakeBack | None = _limit(amount)
    shares: int | TakeBack | None = _limit(whole(1, MOST_SHARES))


@dataclass(frozen=True, slots=True)
class Get(_Verb):
    """Return the VM object, after querying QEMU and the guest."""

    VERB = "get"


@dataclass(frozen=True, slots=True)
class Pulse(_Verb):
    """Take what the guest can spare, leave it ``keep`` available meanwhile, and give all of it back."""

    VERB = "pulse"
    ENDS_WITH_ASKER = True
    keep: Amount | None = _optional(amount, bare=True)
    deadline_s: float | None = _optional(number(1, LONGEST_WAIT_S, "seconds"))


@dataclass(frozen=True, slots=True)
class Doctor(_Verb):
    """Return what the VM's balloon can and cannot do, as findings."""

    VERB = "doctor"


@dataclass(frozen=True, slots=True)
class HostDoctor(_Verb):
    """Return the findings about the host."""

    VERB = "doctor"


@dataclass(frozen=True, slots=True)
class Why(_Verb):
    """Return the last decisions about the VM, with the figures from which each was made."""

    VERB = "why"
    last: int | None = _optional(whole(1, MOST_KEPT), bare=True)


@dataclass(frozen=True, slots=True)
class List(_Verb):
    """Return a short entry for each VM."""

    VERB = "list"


@dataclass(frozen=True, slots=True)
class Room(_Verb):
    """Tell how large a new VM may be now, and whether one of ``size`` fits."""

    VERB = "room"
    size: Amount = _required(amount, bare=True)


@dataclass(frozen=True, slots=True)
class Reclaim(_Verb):
    """Take ``size`` bytes from the VMs within ``deadline_s`` and keep them free for ``hold_s``."""

    VERB = "reclaim"
    size: Amount = _required(amount, bare=True)
    deadline_s: float | None = _optional(_wait)
    hold_s: float | None = _optional(number(0, LONGEST_HOLD_S, "seconds"))


@dataclass(frozen=True, slots=True)
class Release(_Verb):
    """End a hold, by the word that ``reclaim`` returned."""

    VERB = "release"
    hold: str = _required(_hold, bare=True)


@dataclass(frozen=True, slots=True)
class SetPolicy(_Verb):
    """Choose the policy, the host's mode or both."""

    VERB = "set-policy"
    NEEDS_SOME = True
    name: str | None = _optional(word(*POLICIES), bare=True)
    mode: str | None = _optional(word(*MODES))


@dataclass(frozen=True, slots=True)
class Reload(_Verb):
    """Read the configuration again."""

    VERB = "reload"


OfVm: TypeAlias = SetTarget | SetMode | SetLimits | Get | Doctor | Pulse | Why
OfHost: TypeAlias = List | Room | Reclaim | Release | SetPolicy | Reload | HostDoctor
Asked: TypeAlias = OfVm | OfHost

VERBS: Final[Mapping[Scope, Mapping[str, type[Asked]]]] = MappingProxyType(
    {
        "vm": MappingProxyType({kind.VERB: kind for kind in get_args(OfVm)}),
        "host": MappingProxyType({kind.VERB: kind for kind in get_args(OfHost)}),
    }
)


HAS_DEADLINE: Final = frozenset(
    verb
    for verbs in VERBS.values()
    for verb, kind in verbs.items()
    if any(each.name == "deadline_s" for each in fields(kind))
)
"""The verbs that take up to ``deadline_s``."""


def arguments_of(kind: type[Asked]) -> tuple[str, ...]:
    """Return the names of a verb's arguments."""
    return tuple(each.name for each in fields(kind))


def bare_argument(kind: type[Asked]) -> str | None:
    """Return the argument that may be sent alone, without its name; None if the verb has none."""
    return next((each.name for each in fields(kind) if each.metadata["bare"]), None)


def read_asked(verb: str, scope: Scope, content: Content) -> Asked:
    """Return the record of a request, with its arguments checked.

    A size is an `Amount`: a percentage is resolved later, when the size of the VM is known.

    Raises:
        RequestRefused: ``unknown-verb``, ``malformed`` or ``out-of-range``.
    """
    kind = VERBS[scope].get(verb)
    if kind is None:
        raise RequestRefused("unknown-verb", _unknown_verb(verb, scope))
    known = {each.name: each for each in fields(kind)}
    given = content.arguments
    if given is None:
        bare = bare_argument(kind)
        if bare is None:
            raise _malformed(f"{verb} takes {_list(known)}: send an object such as {{}}")
        given = {bare: content.bare}
    reading = _Reading()
    typed = {name: value for name, value in given.items() if value is not None or name not in known}
    arguments = reading.table(typed, (), {name: each.metadata["read"] for name, each in known.items()})
    for fault in reading.faults:
        raise RequestRefused(fault.code, f"{dotted(fault.path)}: {fault.reason}")
    for name, each in known.items():
        if name in given and given[name] is None and "null" in each.metadata:
            arguments[name] = each.metadata["null"]
        elif name not in arguments and each.default is MISSING:
            raise _malformed(f"{verb} needs {name}")
    if kind.NEEDS_SOME and not arguments:
        raise _malformed(f"{verb} needs at least one of {_list(known)}")
    return kind(**arguments)


class _Reading(Reading):
    def unknown(self, path: Path, name: str, known: Collection[str]) -> None:
        """Note an argument that the verb does not have."""
        self.wrong(
            path, unknown_key(name, known, what="argument") if known else "the verb takes no arguments"
        )


def _unknown_verb(verb: str, scope: Scope) -> str:
    other: Scope = "host" if scope == "vm" else "vm"
    if verb in VERBS[other]:
        asked = {"host": "the host", "vm": "a VM"}
        return f"{verb} is asked of {asked[other]}, not of {asked[scope]}"
    known = VERBS[scope]
    return f"no verb {verb[:64]!r}{did_you_mean(verb, known) or f'; there are {_list(known)}'}"


def _list(words: Collection[str]) -> str:
    return ", ".join(words) or "no arguments"


def _malformed(reason: str) -> RequestRefused:
    return RequestRefused("malformed", reason)
