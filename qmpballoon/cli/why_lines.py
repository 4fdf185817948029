"""What an agent answers to ``why``, as lines for a person."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Final

from qmpballoon import terminal
from qmpballoon.policy.decided import FIGURES
from qmpballoon.policy.reasons import WORDS
from qmpballoon.policy.sentences import circumstances, sentence
from qmpballoon.units import format_size

_LINE_AT_MOST: Final = 100  # columns: longer lines are hard to read
_LINE_AT_LEAST: Final = 40
_NOTHING: Final = "Nothing"


def lines_of(why: Mapping[str, object], columns: int | None = None) -> Iterator[str]:
    """Yield the lines for a person: the decisions, the newest last, and what is in force now.

    ``why`` is the result of the verb ``why``; what is missing in it is left out. The lines are filled to
    ``columns``, by default those of the terminal.
    """
    width = max(_LINE_AT_LEAST, min(_LINE_AT_MOST, columns or shutil.get_terminal_size().columns))
    now = _figures(why.get("figures"))
    place = f"{format_size(now['actual'])} of {format_size(now['size'])}"
    ruled = f"auto by {why.get('policy')}" if why.get("mode") == "auto" else f"{why.get('mode')}"
    head = f"{why.get('name')}: {place}, {ruled}, health {why.get('health')}"
    yield from _wrapped("", terminal.clean(head), width)
    decisions = why.get("decisions")
    told = [each for each in decisions if isinstance(each, Mapping)] if isinstance(decisions, list) else []
    for decision in told:
        yield from _wrapped(_time(decision.get("ts")), terminal.clean(_decision(decision)), width)
    if not told:
        yield "no decision is remembered: nothing was moved since the agent came"
    yield from _wrapped("now", terminal.clean(_in_force(why)), width)


def _decision(decision: Mapping[str, object]) -> str:
    why, outcome, to = str(decision.get("why")), decision.get("outcome"), decision.get("to")
    figures = _figures(decision.get("figures"))
    actual = figures["actual"]
    if not isinstance(to, int):
        return f"left at {format_size(actual)} ({why}): {sentence(why, figures)}"
    did = "grew" if actual is not None and to > actual else "shrank"
    if outcome == "observed":
        did = "would have grown" if did == "grew" else "would have shrunk"
    move = f"{did} {format_size(actual)} -> {format_size(to)} ({why})"
    if format_size(actual) == format_size(to):
        move = f"{'would be kept' if outcome == 'observed' else 'kept'} at {format_size(to)} ({why})"
    failed = "; QEMU did not take the target" if outcome == "failed" else ""
    return f"{move}: {'; '.join((sentence(why, figures, to), *circumstances(figures)))}{failed}"


def _in_force(why: Mapping[str, object]) -> str:
    word = why.get("why")
    if not isinstance(word, str):
        return "nothing was decided about it yet"
    since = f" since {_time(why.get('why_since'))}" if why.get("why_since") else ""
    known = WORDS.get(word)
    if known is None:
        return f"{word}{since}"
    command = f"set {shlex.quote(str(why.get('name')))} auto"
    advice = "" if known.do.startswith(_NOTHING) else f" {known.do.replace('set VM auto', command)}"
    return f"{word}{since}: {known.means}{advice}"


def _figures(told: object) -> dict[str, int | None]:
    """Return the figures by name; what is missing or no number is None."""
    figures = told if isinstance(told, Mapping) else {}
    return {name: value if isinstance(value := figures.get(name), int) else None for name in FIGURES}


def _time(stamp: object) -> str:
    """Return an RFC 3339 stamp as local time, with the date unless it is today's."""
    try:
        local = datetime.fromisoformat(str(stamp)).astimezone()
    except (ValueError, OverflowError):  # the first and last days of all
        return terminal.clean(stamp)
    is_today = local.date() == datetime.now().astimezone().date()
    return f"{local:%H:%M:%S}" if is_today else f"{local:%Y-%m-%d %H:%M:%S}"


def _wrapped(label: str, text: str, width: int) -> list[str]:
    """Return the text filled to the width, below each other beside its label."""
    start = f"{label:8}  " if label else ""
    return textwrap.wrap(
        text,
        width,
        initial_indent=start,
        subsequent_indent=" " * max(2, len(start)),
        break_on_hyphens=False,
    )
