"""``check-config``: all errors of a configuration file at once, or its settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final

from qmpballoon import terminal
from qmpballoon.cli.program import DONE, WRONG_USAGE
from qmpballoon.config import CgroupBudget, Configuration, load
from qmpballoon.errors import ConfigurationError, Problem
from qmpballoon.procfs import read_host
from qmpballoon.units import format_size

EXAMPLES: Final = """\
examples:
  qmpballoon check-config /etc/qmpballoon.toml
  qmpballoon check-config /etc/qmpballoon.toml --json | jq '.problems[].reason'
  qmpballoon agent --print-default-config > qmpballoon.toml      to start from

Exit code 0: an agent can use the file here. 2: it cannot; each error has its line, its key and what is
valid. The agent makes the same checks at its start and at a reload. Some are about this machine and user:
files and their rights, the state directory, the cgroup. Run it as the user of the agent. What the agent
only logs is a warning on stderr, and no error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("file", metavar="FILE", help="configuration file (TOML)")
    parser.add_argument("--json", action="store_true", help='print {"file", "ok", "problems"}')


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    try:
        configuration = load(arguments.file)
        doubts = _checked(configuration)
    except ConfigurationError as error:
        if not arguments.json:
            raise
        problems = [
            {
                "line": problem.line,
                "key": problem.key or None,
                "reason": f"{problem.file}: {problem.reason}" if problem.file else problem.reason,
            }
            for problem in error.problems
        ]
        terminal.print_json({"file": arguments.file, "ok": False, "problems": problems})
        return WRONG_USAGE
    for doubt in doubts:
        terminal.print_error(terminal.clean(f"warning: {doubt}"))
    if arguments.json:
        terminal.print_json({"file": arguments.file, "ok": True, "problems": []})
        return DONE
    warnings = f", with {len(doubts)} warning{'s' * (len(doubts) > 1)}" if doubts else ""
    print(f"{terminal.clean(arguments.file)}: ok{warnings}")
    for subject, setting in _in_force(configuration):
        print(terminal.clean(f"  {subject:<9} {setting}"))
    return DONE


def _checked(configuration: Configuration) -> tuple[str, ...]:
    """Return a line for each warning.

    Raises:
        ConfigurationError: an agent cannot run the configuration here.
    """
    from qmpballoon.agent.usable import findings  # imports msgpack: not for --help

    errors: list[Problem] = []
    warnings: list[Problem] = []
    for finding in findings(configuration):
        (errors if finding.is_error else warnings).append(finding.problem(configuration.source))
    if errors:
        raise ConfigurationError(configuration.source, errors)
    return ConfigurationError(configuration.source, warnings).lines


def _in_force(configuration: Configuration) -> Iterator[tuple[str, str]]:
    mqtt, policy, vm = configuration.mqtt, configuration.policy, configuration.vm
    yield "host", f"{configuration.agent.host}, state in {configuration.agent.state_dir or 'no file'}"
    yield "sockets", " ".join(configuration.discovery.sockets) or "none"
    if mqtt.enabled:
        brokers = ", then ".join(str(url) for url in mqtt.url)
        user = f" as {mqtt.username}" if mqtt.username else ""
        yield "broker", f"{brokers}{user}; topics {mqtt.base_topic}/..., payload {mqtt.payload}"
    else:
        yield "broker", "none: the agent rules without MQTT"
    yield "budget", f"{_budget(configuration)}; {configuration.host.reserve} of the host stay free"
    yield "policy", f"{policy.name}, mode {policy.mode}"
    yield (
        "VMs",
        f"floor {vm.floor}, ceiling {vm.ceiling}, shares {vm.shares}, stats every {vm.stats_interval_s} s",
    )
    for match in configuration.matches:
        globs = " and ".join(glob for glob in (match.name, match.socket) if glob)
        what = [f"{key} {value}" for key, value in match.settings]
        what += [f"renamed {match.rename}"] if match.rename else []
        yield "", f"{globs}: {', '.join(what) or 'nothing of its own'}"


def _budget(configuration: Configuration) -> str:
    budget, total = configuration.host.budget, read_host().mem_total
    if isinstance(budget, CgroupBudget):
        return f"memory.max of {budget.group}, less what is not guest memory"
    if budget.relative and total:
        return f"{budget} of this machine's {format_size(total)} = {format_size(budget.of(total))}"
    return str(budget)
