"""``agent``: the daemon, from a configuration file and options that override it."""

from __future__ import annotations

import argparse
import asyncio
import glob
import os
from functools import partial
from typing import Final

from qmpballoon import log
from qmpballoon.addresses import is_file
from qmpballoon.cli.program import DONE
from qmpballoon.config import (
    COMMAND_LINE,
    MODES,
    POLICIES,
    Configuration,
    default_text,
    defaults,
    load,
    override,
    refused_path,
)
from qmpballoon.errors import ConfigurationError, Problem

EXAMPLES: Final = """\
examples:
  qmpballoon agent '/run/qmpballoon/*.qmp'      control VMs without MQTT
  qmpballoon agent --mode observe               decide and publish, move nothing
  qmpballoon agent --broker mqtt://localhost
  qmpballoon agent --vm vm.qmp --budget cgroup:  beside one QEMU
  qmpballoon agent -c /etc/qmpballoon.toml -v
  qmpballoon agent --print-default-config > qmpballoon.toml

Options override the file. SIGHUP reads the file again; SIGTERM ends the agent with 0, Ctrl-C with
130, within ten seconds whatever else happens, and both leave the balloons as they are unless on_exit
is set. A second one of either ends it at once, by that signal: for a shell 143 or 130. A broker that is
down never stops it. A monitor serves one client: give QEMU a -qmp of its own for the agent.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "sockets",
        nargs="*",
        metavar="SOCKET_OR_GLOB",
        help="QMP sockets or quoted globs, watched: VMs come and go (default: /run/qmpballoon/*.qmp)",
    )
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        default=None,
        help="let tcp:HOST:PORT be another machine: a monitor has no password and no encryption",
    )
    parser.add_argument(
        "--vm",
        action="append",
        metavar="SOCKET",
        help="serve this QEMU alone and end with it; no state is kept unless --state-dir is given",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="configuration file (TOML)")
    parser.add_argument(
        "--print-default-config", action="store_true", help="print a complete, commented file and exit"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    policy = parser.add_argument_group("policy and host")
    policy.add_argument("--policy", choices=POLICIES, help="what decides (default: fairshare)")
    policy.add_argument(
        "--mode", choices=MODES, help="observe decides and publishes, moves nothing (default: auto)"
    )
    policy.add_argument(
        "--budget",
        metavar="SIZE",
        help="what all VMs together may hold: a size, 80%%, cgroup:PATH or "
        "cgroup: (the one that the agent runs in)",
    )
    policy.add_argument("--reserve", metavar="SIZE", help="host memory that stays free (default: 512MiB)")
    policy.add_argument("--host", metavar="NAME", help="name of this host in topics (default: host name)")
    policy.add_argument(
        "--state-dir",
        metavar="DIR",
        help="where names, limits and targets survive a restart; '' for nowhere",
    )
    policy.add_argument(
        "--control",
        metavar="PATH",
        help="socket for the other commands; '' for none (default: in --state-dir)",
    )
    mqtt = parser.add_argument_group("MQTT")
    mqtt.add_argument(
        "--broker",
        action="append",
        metavar="URL",
        help="mqtt://HOST, mqtts, ws or wss; given again: tried in turn (default: none)",
    )
    mqtt.add_argument("--username", metavar="NAME", help="with --password-file")
    mqtt.add_argument("--password-file", metavar="FILE", help="file that holds the password")
    mqtt.add_argument("--ca-file", metavar="FILE", help="certificates to check the broker's against (PEM)")
    mqtt.add_argument("--base-topic", metavar="TOPIC", help="start of all topics (default: qmpballoon)")
    mqtt.add_argument("--payload", choices=("json", "msgpack"), help="of what is published (default: json)")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    if arguments.print_default_config:
        print(default_text(), end="")
        return DONE
    configuration = configured(arguments)
    from qmpballoon.agent.app import run as run_agent  # after the options are checked: it imports MQTT
    from qmpballoon.agent.event_loop import collect_seldom, loop_factory

    log.set_up(verbose=arguments.verbose)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        collect_seldom(runner.get_loop())
        run = partial(run_agent, ends_with_qemu=True) if arguments.vm is not None else run_agent
        return runner.run(run(configuration, reload=lambda: configured(arguments)))


def configured(arguments: argparse.Namespace) -> Configuration:
    """Return the configuration of the file, if one is given, with the options that override it.

    Raises:
        ConfigurationError: the file or an option is invalid; has all problems.
    """
    sockets, state_dir = arguments.sockets, arguments.state_dir
    refused = [refused_path(each, allow_remote=True) for each in (*sockets, *(arguments.vm or ()))]
    problems = [Problem(None, "SOCKET", why) for why in refused if why is not None]
    if arguments.vm is not None:
        if sockets or len(arguments.vm) > 1:
            problems.append(Problem(None, "--vm", "is the agent of one VM: name no other sockets"))
        (vm, *_) = arguments.vm
        if is_file(vm) and glob.has_magic(vm) and not os.path.lexists(vm):
            problems.append(Problem(None, "--vm", f"takes the socket of one VM, and no glob: {vm}"))
        sockets = [glob.escape(vm) if is_file(vm) else vm]
        state_dir = state_dir or ""
    if problems:
        raise ConfigurationError(COMMAND_LINE, problems)
    configuration = load(arguments.config) if arguments.config else defaults()
    return override(
        configuration,
        host=arguments.host,
        state_dir=state_dir,
        control=arguments.control,
        sockets=sockets,
        allow_remote=arguments.allow_remote,
        broker=arguments.broker,
        username=arguments.username,
        password_file=arguments.password_file,
        ca_file=arguments.ca_file,
        base_topic=arguments.base_topic,
        payload=arguments.payload,
        policy=arguments.policy,
        mode=arguments.mode,
        budget=arguments.budget,
        reserve=arguments.reserve,
    )
