"""``why``: the last decisions about a VM, each with its figures, in a person's words."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from qmpballoon import terminal
from qmpballoon.cli.arguments import count
from qmpballoon.cli.program import CANNOT_REACH, DONE, exit_code
from qmpballoon.cli.vms import ARGUMENT_HELP, Chosen, add_control_argument, choose
from qmpballoon.control import connected_to
from qmpballoon.errors import QmpBalloonError, Unreachable
from qmpballoon.policy.decided import FIGURES, MOST_KEPT
from qmpballoon.policy.reasons import WORDS
from qmpballoon.policy.sentences import circumstances, sentence
from qmpballoon.units import format_size

EXAMPLES: Final = f"""\
examples:
  qmpballoon why web1                the last decisions about a VM
  qmpballoon why web1 --last {MOST_KEPT}      all that its agent remembers
  qmpballoon why 'db-*' --last 1
  qmpballoon why web1 --json | jq '.[0].decisions[-1].figures'

Decisions are those of the agent that holds the VM's monitor. The word in parentheses is
stable: it stands in the VM's state and events as well, and docs/why.md explains each.
"""

_LINE_AT_MOST: Final = 100  # columns: longer lines are hard to read
_LINE_AT_LEAST: Final = 40
_USUAL_LAST: Final = 10
_NOTHING: Final = "Nothing"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the agent answered about one VM; ``error`` is why it did not."""

    found: Chosen
    why: Mapping[str, object] | None = None
    error: QmpBalloonError | None = None

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.found.vm.name if self.found.vm else Path(self.found.path).stem

    def as_json(self) -> dict[str, object]:
        """Return the answer as the printed object: the agent's, with the agent's name and the error."""
        return {
            **(self.why or {"name": self.name}),
            "agent": self.found.agent and self.found.agent.host,
            "error": self.error and {"code": self.error.code, "message": str(self.error)},
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("vm", metavar="VM_OR_SOCKET", help=ARGUMENT_HELP.partition(";")[0])
    parser.add_argument(
        "--last",
        type=count(MOST_KEPT),
        default=_USUAL_LAST,
        metavar="N",
        help=f"how many decisions (default: {_USUAL_LAST}, at most {MOST_KEPT})",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects, sizes in bytes")
    add_control_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    answers, problems = asyncio.run(_ask_typed(arguments))
    if arguments.json:
        terminal.print_json([answer.as_json() for answer in answers])
    code = DONE
    printed = 0
    for answer in answers:
        if answer.error:
            terminal.print_error(terminal.clean(answer.error))
            code = max(code, exit_code(answer.error))
        elif answer.why is not None and not arguments.json:
            print("\n" * (printed > 0) + "\n".join(lines_of(answer.why)))
            printed += 1
    if printed:
        for agent in dict.fromkeys(answer.found.agent for answer in answers if answer.error is None):
            print(terminal.coloured(f"through {agent}", "dim"))
    if code == CANNOT_REACH:
        for problem in problems:
            terminal.print_error(terminal.clean(problem))
    return code


async def _ask_typed(arguments: argparse.Namespace) -> tuple[list[Answer], Sequence[str]]:
    choice = await choose([arguments.vm], arguments.control)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_ask(found, arguments.last), name=f"why {found.path}") for found in choice.vms
        ]
    return [task.result() for task in tasks], choice.problems


async def _ask(found: Chosen, last: int) -> Answer:
    if found.through is None:
        return Answer(
            found,
            error=Unreachable(
                f"no running agent holds {found.path}, and only an agent decides: see qmpballoon agent --help"
            ),
        )
    agent, vm = found.through
    try:
        async with connected_to(agent.path) as client:
            answer = await client.request("why", vm.id, last=last)
    except QmpBalloonError as error:
        return Answer(found, error=error)
    return Answer(found, answer if isinstance(answer, Mapping) else {})


def lines_of(why: Mapping[str, object]) -> Iterator[str]:
    """Yield the lines for a person: the decisions, the newest last, and what is in force now."""
    width = max(_LINE_AT_LEAST, min(_LINE_AT_MOST, shutil.get_terminal_size().columns))
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
    advice = "" if known.do.startswith(_NOTHING) else f" {known.do}"
    return f"{word}{since}: {known.means}{advice}"


def _figures(told: object) -> dict[str, int | None]:
    """Return the figures by name; what is missing or no number is None."""
    figures = told if isinstance(told, Mapping) else {}
    return {name: value if isinstance(value := figures.get(name), int) else None for name in FIGURES}


def _time(stamp: object) -> str:
    """Return an RFC 3339 stamp as local time, with the date unless it is today's."""
    try:
        local = datetime.fromisoformat(str(stamp)).astimezone()
    except ValueError:
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
