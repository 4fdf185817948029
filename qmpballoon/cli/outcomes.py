"""What became of each VM that a verb was given: as lines or JSON, and as the exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from qmpballoon import terminal
from qmpballoon.cli.program import DONE, exit_code
from qmpballoon.errors import MonitorBusy, QmpBalloonError


class Outcome(Protocol):
    """The result for one VM; ``error`` is None if it went well."""

    @property
    def error(self) -> QmpBalloonError | None: ...  # noqa: D102
    def as_json(self) -> Mapping[str, object]: ...  # noqa: D102
    def as_line(self) -> str: ...  # noqa: D102


_O = TypeVar("_O", bound=Outcome)


def error_object(error: QmpBalloonError | None) -> dict[str, object] | None:
    """Return an error as the object that is printed; None without one."""
    return None if error is None else {"code": error.code, "message": str(error)}


def print_outcomes(
    outcomes: Sequence[_O],
    problems: Sequence[str],
    *,
    as_json: bool,
    error_line: Callable[[_O], object] = lambda outcome: outcome.error,
) -> int:
    """Print the outcomes, their errors on stderr, and return the exit code: that of the worst.

    ``problems`` are why agents could not be asked: told if a monitor is busy, which one of them may hold.
    """
    if as_json:
        terminal.print_json([outcome.as_json() for outcome in outcomes])
    code = DONE
    if any(isinstance(outcome.error, MonitorBusy) for outcome in outcomes):
        for problem in problems:
            terminal.print_error(terminal.clean(problem))
    for outcome in outcomes:
        if outcome.error:
            terminal.print_error(terminal.clean(error_line(outcome)))
            code = max(code, exit_code(outcome.error))
        elif not as_json:
            print(terminal.clean(outcome.as_line()))
    return code
