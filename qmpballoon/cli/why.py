"""``why``: the last decisions about a VM, each with its figures, in a person's words."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qmpballoon import terminal
from qmpballoon.addresses import name_from
from qmpballoon.cli.arguments import count
from qmpballoon.cli.broker import add_broker_arguments, broker_access
from qmpballoon.cli.outcomes import error_object
from qmpballoon.cli.program import CANNOT_REACH, DONE, exit_code
from qmpballoon.cli.vms import ARGUMENT_HELP, Chosen, add_control_argument, choose
from qmpballoon.cli.why_lines import lines_of
from qmpballoon.config import COMMAND_LINE
from qmpballoon.control import connected_to
from qmpballoon.errors import ConfigurationError, Problem, QmpBalloonError, Unreachable
from qmpballoon.model.names import safe_name
from qmpballoon.policy.decided import MOST_KEPT

if TYPE_CHECKING:
    from qmpballoon.client import Client

EXAMPLES: Final = f"""\
examples:
  qmpballoon why web1                the last decisions about a VM
  qmpballoon why web1 --last {MOST_KEPT}      all that its agent remembers
  qmpballoon why 'db-*' --last 1
  qmpballoon why web1 --json | jq '.[0].decisions[-1].figures'
  qmpballoon why edge-7/web1 --broker mqtt://localhost

Decisions are those of the agent that holds the VM's monitor. The word in parentheses is stable: it
stands in the VM's state and events as well, and docs/why.md explains each.

With --broker or -c the agent is asked over MQTT, on any host, and the VM is HOST/VM; $QMPBALLOON_BROKER
alone does not choose this. The other broker options override the file.
"""

_USUAL_LAST: Final = 10


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent answered about one VM; ``error`` is why it did not; ``through`` says whom was asked."""

    name: str
    why: Mapping[str, object] | None = None
    error: QmpBalloonError | None = None
    agent: str | None = None  # its host
    through: str | None = None

    def as_json(self) -> dict[str, object]:
        """Return the answer as the printed object: the agent's, with the agent's name and the error."""
        return {
            **(self.why or {"name": self.name}),
            "agent": self.agent,
            "error": error_object(self.error),
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
    add_broker_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    problems: Sequence[str] = ()
    if arguments.broker or arguments.config:
        answers = [_asked_over_mqtt(arguments)]
    else:
        answers, problems = asyncio.run(_ask_typed(arguments))
    if arguments.json:
        terminal.print_json([answer.as_json() for answer in answers])
    code = DONE
    for answer in answers:
        if answer.error:
            terminal.print_error(terminal.clean(answer.error))
            code = max(code, exit_code(answer.error))
    if code == CANNOT_REACH:
        for problem in problems:
            terminal.print_error(terminal.clean(problem))
    if not arguments.json:
        _print(answer for answer in answers if answer.why is not None)
    return code


def _print(answers: Iterable[Answer]) -> None:
    through: dict[str, None] = {}
    for number, answer in enumerate(answers):
        if number:
            print()
        for line in lines_of(answer.why or {}):
            print(line)
        if answer.through is not None:
            through[answer.through] = None
    for agent in through:
        print(terminal.coloured(terminal.clean(f"through {agent}"), "dim"))


def _asked_over_mqtt(arguments: argparse.Namespace) -> Answer:
    host, slash, vm = arguments.vm.partition("/")
    if not (host and slash and vm) or "/" in vm:
        reason = "is HOST/VM with --broker or -c, such as edge-7/web1"
        raise ConfigurationError(COMMAND_LINE, [Problem(None, "VM", reason)])
    access = broker_access(arguments)
    try:
        why = asyncio.run(_ask_over_mqtt(access.client, f"{safe_name(host)}/{safe_name(vm)}", arguments.last))
    except QmpBalloonError as error:
        return Answer(arguments.vm, error=error, agent=host)
    return Answer(arguments.vm, why, agent=host, through=f"the agent {host}, over MQTT")


async def _ask_over_mqtt(client: Client, target: str, last: int) -> Mapping[str, object]:
    async with client:
        answer = await client.request(target, "why", last=last)
    return answer if isinstance(answer, Mapping) else {}


async def _ask_typed(arguments: argparse.Namespace) -> tuple[list[Answer], Sequence[str]]:
    choice = await choose([arguments.vm], arguments.control, allow_remote=arguments.allow_remote)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_ask(found, arguments.last), name=f"why {found.path}") for found in choice.vms
        ]
    return [task.result() for task in tasks], choice.problems


async def _ask(found: Chosen, last: int) -> Answer:
    if found.through is None:
        reason = f"no agent holds {found.path}, and only an agent decides: see qmpballoon agent --help"
        return Answer(name_from(found.path), error=Unreachable(reason))
    agent, vm = found.through
    try:
        async with connected_to(agent.path) as client:
            answer = await client.request("why", vm.id, last=last)
    except QmpBalloonError as error:
        return Answer(vm.name, error=error, agent=agent.host)
    return Answer(vm.name, answer if isinstance(answer, Mapping) else {}, None, agent.host, str(agent))
