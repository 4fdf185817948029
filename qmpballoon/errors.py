"""Every error that the package raises deliberately, as one tree.

::

    QmpBalloonError                    .code is the stable error word, the message says what to do
    ├ Unreachable(OSError)             offline     no socket, no listener, access denied
    ├ MonitorBusy                      busy        another client holds the monitor
    ├ ConnectionLost                   offline     it ended, or sent something else than QMP
    ├ QmpError                         qmp-error   QEMU answered with an error
    ├ NoBalloon                        no-balloon  the VM has no virtio balloon
    ├ OutOfRange(ValueError)           out-of-range
    ├ InvalidSize(ValueError)          malformed
    ├ NotReady(TimeoutError)           no-driver   the guest's balloon driver did not come up in time
    ├ NotReached(TimeoutError)         not-reached the balloon did not reach its target in time
    ├ RequestRefused                   any word of ERROR_WORDS: the answer to an MQTT request
    ├ NoAnswer(TimeoutError)           offline     no agent answered a request in time
    ├ ConfigurationError               malformed   all problems of a configuration, at once
    ├ AnotherAgentRuns                 busy        an agent of this name holds the lock
    └ StateUnusable(OSError)           internal    the state directory cannot be used

An error keeps its facts in fields and forms its message last. It can be copied and pickled, for use
between processes.

Some are builtin errors as well. A TimeoutError is an OSError, so ``except OSError`` and ``except
TimeoutError`` also catch NotReady and NotReached.
"""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qmpballoon.model.records import VmState

ERROR_WORDS: Final = (
    "malformed",
    "unknown-verb",
    "unknown-vm",
    "out-of-range",
    "not-allowed",
    "busy",
    "superseded",
    "expired",
    "retained",
    "not-reached",
    "no-balloon",
    "no-driver",
    "offline",
    "qmp-error",
    "too-large",
    "internal",
)


class QmpBalloonError(Exception):
    """Base of all errors of this package."""

    code: str = "internal"

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild it from its fields: the constructors take facts, and ``args`` has the message."""
        return copyreg.__newobj__, (type(self),), {"args": self.args, **self.__dict__}  # type: ignore[attr-defined]


class Unreachable(QmpBalloonError, OSError):
    """The monitor's socket does not exist, no process listens on it, or access is denied."""

    code = "offline"
    stopped_pid: int | None = None  # of a QEMU that is stopped by a signal, and so does not answer


class MonitorBusy(QmpBalloonError):
    """Another client holds the monitor: a QMP monitor serves one client at a time."""

    code = "busy"


class ConnectionLost(QmpBalloonError):
    """The connection to the monitor ended, timed out, or the peer does not speak QMP."""

    code = "offline"


class QmpError(QmpBalloonError):
    """QEMU answered a command with an error."""

    code = "qmp-error"

    def __init__(self, command: str, error_class: str, description: str) -> None:
        self.command = command
        self.error_class = error_class
        self.description = description
        super().__init__(f"QEMU refused {command}: {description} ({error_class})")


class NoBalloon(QmpBalloonError):
    """The VM has no virtio balloon device."""

    code = "no-balloon"


class OutOfRange(QmpBalloonError, ValueError):
    """A valid size or number that is outside the permitted range."""

    code = "out-of-range"


class InvalidSize(QmpBalloonError, ValueError):
    """Text that is not a size."""

    code = "malformed"

    def __init__(self, text: object, hint: str) -> None:
        self.text = text
        self.hint = hint
        super().__init__(f"{text!r} is no size: {hint}")


class NotReady(QmpBalloonError, TimeoutError):
    """The guest's balloon driver, or its first fresh statistics, did not come in time."""

    code = "no-driver"


class NotReached(QmpBalloonError, TimeoutError):
    """The balloon did not reach its target in time; the target stays, and may still be reached."""

    code = "not-reached"

    def __init__(
        self, target: int | None, state: VmState, waited_s: float, message: str | None = None
    ) -> None:
        self.target = target  # None: the wait was for another condition
        self.state = state
        outcome = "what was waited for did not come true" if target is None else f"not {target}"
        super().__init__(
            message
            or f"the guest has {state.actual} bytes, {outcome}, after {waited_s:g} s; the target stays"
        )


class RequestRefused(QmpBalloonError):
    """A request that is answered with one of ERROR_WORDS."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class NoAnswer(QmpBalloonError, TimeoutError):
    """No agent answered a request over MQTT in time, or the broker knows that none receives it."""

    code = "offline"


def answered_error(word: str, message: str) -> QmpBalloonError:
    """Return the error that an answer stands for; its ``code`` is the word.

    It is of the class that the same failure has without an agent, where that class needs no more than a
    message, else RequestRefused.
    """
    match word:
        case "offline":
            return Unreachable(message)
        case "no-balloon":
            return NoBalloon(message)
        case "out-of-range":
            return OutOfRange(message)
        case "no-driver":
            return NotReady(message)
    return RequestRefused(word, message)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a configuration file."""

    line: int | None  # counted from 1; None: not tied to a line
    key: str  # dotted path: "vm.match[1].floor"; "" for the file as a whole
    reason: str  # what is wrong and what is valid
    file: str | None = None  # the file that the key names, if the problem is in there

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line is not None else ""
        return f"{place}{self.key}: {self.reason}" if self.key else f"{place}{self.reason}"


class ConfigurationError(QmpBalloonError):
    """A configuration that cannot be used; ``problems`` has all its problems."""

    code = "malformed"

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(self.lines))

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each problem, with its place; may contain text of the file."""
        return tuple(self._line(problem) for problem in self.problems)

    def _line(self, problem: Problem) -> str:
        if problem.file is None:
            return f"{self.source}: {problem}"
        place = "" if problem.line is None else f" ({self.source}: line {problem.line})"
        key = f"{problem.key}: " if problem.key else ""
        return f"{problem.file}: {key}{problem.reason}{place}"


class AnotherAgentRuns(QmpBalloonError):
    """An agent with this host name and state directory runs already."""

    code = "busy"

    def __init__(self, host: str, state_dir: str) -> None:
        self.host = host
        self.state_dir = state_dir
        super().__init__(
            f"another agent named {host!r} runs on this machine (it holds the lock in {state_dir}); "
            "stop it, or give this one its own --host and --state-dir"
        )


class StateUnusable(QmpBalloonError, OSError):
    """The agent's state directory cannot be created or written."""

    code = "internal"

    def __init__(self, state_dir: str, cause: OSError) -> None:
        self.state_dir = state_dir
        super().__init__(
            f"cannot use the state directory {state_dir}: {cause.strerror or cause}; "
            "name another with --state-dir"
        )
