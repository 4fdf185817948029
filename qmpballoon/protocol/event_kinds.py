"""The events that an agent publishes: one row for each word, with the rows of its data. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qmpballoon.model.records import HEALTH_WORDS, LEVELS, MODES, POLICIES
from qmpballoon.policy.reasons import WORDS
from qmpballoon.protocol.fields import Field, Kind


@dataclass(frozen=True, slots=True)
class EventKind:
    """An event's word, what it means, and its data.

    ``optional`` are the data that are not always there. ``is_open``: QEMU may add more of its own.
    """

    word: str
    about: str
    data: tuple[Field, ...] = ()
    optional: frozenset[str] = frozenset()
    is_open: bool = False


def _row(path: str, kind: Kind, about: str, *words: str, nullable: bool = False) -> Field:
    return Field(path, kind, about, nullable=nullable, words=words)


def _change(about: str, *words: str) -> tuple[Field, ...]:
    return (
        _row("from", "word", f"{about} before.", *words),
        _row("to", "word", f"{about} now.", *words),
    )


def _qmp(word: str, about: str, *data: Field) -> EventKind:
    names = frozenset(each.path for each in data)
    return EventKind(word, about, data, optional=names, is_open=True)


_BY_GUEST: Final = _row("guest", "flag", "Whether the guest asked for it.")
_REASON: Final = _row("reason", "text", "QEMU's word for the reason.")
_REFUTED: Final = (
    _row("held", "bytes", "What the guest reports to hold.", nullable=True),
    _row("rss", "bytes", "What its QEMU has resident.", nullable=True),
)
_ALARM: Final = (
    _row("reason", "text", "What is wrong."),
    _row("budget", "bytes", "What all VMs together may hold."),
    _row("lent", "bytes", "What VMs hold above that."),
)

VM_EVENTS: Final[tuple[EventKind, ...]] = (
    EventKind(
        "added",
        "A VM appeared for the first time.",
        (
            _row("name", "text", "The VM's name in full."),
            _row("socket", "text", "File name of its monitor's socket."),
        ),
    ),
    EventKind(
        "removed",
        "The agent forgot the VM; its retained topics are cleared.",
        (
            _row(
                "why",
                "word",
                "`gone`: no socket and no process for `forget_after_s`; `not-configured`: no glob matches "
                "its socket any more; `same-vm`: it is another monitor of a VM that has another name.",
                "gone",
                "not-configured",
                "same-vm",
            ),
        ),
    ),
    EventKind(
        "renamed",
        "The VM has another name in topics; published under the old one, whose topics are cleared.",
        (_row("from", "text", "The name before."), _row("to", "text", "The name now.")),
    ),
    EventKind("health", "Its health changed.", _change("The health", *HEALTH_WORDS)),
    EventKind("mode", "Its mode changed.", _change("The mode", *MODES)),
    EventKind(
        "limits",
        "Its limits changed.",
        (
            _row("floor", "bytes", "The least that is ever asked for.", nullable=True),
            _row("ceiling", "bytes", "The most that is ever asked for.", nullable=True),
            _row("shares", "whole", "Relative claim when memory is short."),
            _row("overridden", "list", "Which of these were set by a request."),
        ),
    ),
    EventKind(
        "decision",
        "A target was sent, or would have been in mode `observe`.",
        (
            _row("from", "bytes", "`actual` before.", nullable=True),
            _row("to", "bytes", "The target."),
            _row("why", "word", "The reason.", *WORDS),
            _row(
                "policy",
                "word",
                "The policy that decided; null for a manual target.",
                *POLICIES,
                nullable=True,
            ),
            _row("sent", "flag", "False if the target was not sent, because the mode is `observe`."),
        ),
    ),
    EventKind("claim-refuted", "The guest reports to hold more than its QEMU has resident.", _REFUTED),
    EventKind("claim-plausible", "That is over.", _REFUTED),
    EventKind(
        "balloon-change",
        "The balloon moved; at most one a second, with the last value.",
        (_row("actual", "bytes", "Memory that the guest has."),),
        is_open=True,
    ),
    _qmp("stopped", "The VM was paused."),
    _qmp("resumed", "The VM runs again."),
    _qmp("reset", "The guest was reset.", _BY_GUEST, _REASON),
    _qmp("shutdown", "The guest shut down.", _BY_GUEST, _REASON),
    _qmp("powerdown", "The guest was asked to power down."),
    _qmp("suspend", "The guest sleeps."),
    _qmp("suspend-disk", "The guest hibernates."),
    _qmp("wakeup", "The guest woke up."),
    _qmp("watchdog", "The guest's watchdog expired.", _row("action", "text", "What QEMU does.")),
    _qmp("guest-panicked", "The guest's kernel panicked.", _row("action", "text", "What QEMU does.")),
    _qmp(
        "guest-crashloaded", "The guest loaded its crash kernel.", _row("action", "text", "What QEMU does.")
    ),
)
"""On a VM's topic."""

_OWNER: Final = _row("owner", "whole", "User id of the process behind the socket.", nullable=True)

HOST_EVENTS: Final[tuple[EventKind, ...]] = (
    EventKind("level", "How short the host's memory is changed.", _change("The level", *LEVELS)),
    EventKind("policy", "The policy changed.", _change("The policy", *POLICIES)),
    EventKind("mode", "The host's mode changed.", _change("The mode", *MODES)),
    EventKind(
        "hold",
        "Memory is kept free for a request, or is no longer.",
        (
            _row("hold", "text", "The hold's name."),
            _row("size", "bytes", "How much it keeps free."),
            _row("change", "word", "What happened.", "taken", "released", "expired"),
        ),
    ),
    EventKind("alarm", "An alarm began.", _ALARM),
    EventKind("alarm-over", "It ended.", _ALARM),
    EventKind(
        "name-claimed",
        "A QEMU claims a name that may be another's.",
        (
            _row("name", "text", "The name that it claims."),
            _row("vm", "text", "The name in topics that it gets."),
            _row("socket", "text", "Path of its monitor's socket."),
            _OWNER,
            _row("why", "word", "Why the name is doubtful.", "reserved", "taken", "remembered", "new-owner"),
        ),
    ),
    EventKind(
        "session-excess",
        "A monitor sent what no QEMU sends, and is left alone for some time.",
        (
            _row("vm", "text", "The VM, if one is known.", nullable=True),
            _row("socket", "text", "Path of its monitor's socket."),
            _row("pid", "whole", "Process behind the socket.", nullable=True),
            _OWNER,
            _row("reason", "text", "What it sent."),
        ),
    ),
)
"""On the host's topic."""

LAGGED: Final = EventKind(
    "lagged",
    "Events are missing, because the reader was too slow: on the control socket, and in programs.",
    (_row("missed", "whole", "How many."),),
)
