"""``forget``: clears the retained topics of a host or a VM that is gone."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qmpballoon import terminal
from qmpballoon.cli.broker import ABOUT, BrokerAccess, add_broker_arguments, broker_access
from qmpballoon.cli.program import DONE, FAILED
from qmpballoon.errors import RequestRefused
from qmpballoon.model.names import safe_name

if TYPE_CHECKING:
    from qmpballoon.mqtt.topics import Topics

EXAMPLES: Final = f"""\
examples:
  qmpballoon forget trial --broker mqtt://localhost
  qmpballoon forget edge-7/web1 -c /etc/qmpballoon.toml --json

An agent clears the topics of a VM that is gone by itself, after forget_after_s. Those of a host that
never comes back stay on the broker for ever: its objects, those of its VMs, and its devices in Home
Assistant.
This verb clears them, and prints each topic. If nothing is retained, that is said, with exit code 0.

While the host's agent is online it is refused without --force: the agent would publish them again. An
agent counts as online while its status says so and its host object is not older than three heartbeats.

{ABOUT}"""

_MOST_PASSES: Final = 5
_MOST_NAMED: Final = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("name", metavar="HOST[/VM]", type=_name, help="the host, or one of its VMs")
    parser.add_argument("--force", action="store_true", help="even if the host's agent is online")
    parser.add_argument("--json", action="store_true", help='print {"host", "vm", "online", "cleared"}')
    add_broker_arguments(parser)
    parser.add_argument(
        "--discovery-prefix",
        metavar="TOPIC",
        help="where the devices of Home Assistant are (default: homeassistant)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    access = broker_access(arguments)
    return asyncio.run(_forget(access, *arguments.name, force=arguments.force, as_json=arguments.json))


def devices_of(topics: Topics, vm: str | None, found: Mapping[str, bytes]) -> set[str]:
    """Return those of the retained topics that announce the host, its VMs or one VM to Home Assistant.

    Names of hosts and VMs may have underscores, so an id alone may be that of another host.
    """
    device = topics.device_id(vm)
    base = f"{topics.base}/".encode()
    chosen: set[str] = set()
    for topic, payload in found.items():
        name = topics.device_of(topic)
        if name is None:
            continue
        is_named = name == device or (vm is None and name.startswith(f"{device}_"))
        is_exact_and_vague = name == device and base not in payload
        if is_named and (topics.is_of_host(payload) or is_exact_and_vague):
            chosen.add(topic)
    return chosen


async def _forget(access: BrokerAccess, host: str, vm: str | None, *, force: bool, as_json: bool) -> int:
    from qmpballoon.mqtt.topics import Topics  # imports MQTT: not for --help

    topics = Topics(access.base_topic, host, discovery_prefix=access.discovery_prefix)
    tree, statuses = topics.tree(vm), f"{topics.base}/+/status"
    cleared: dict[str, None] = {}
    refused: dict[str, str] = {}
    async with access.client as client:
        heard = found = await client.retained(statuses, topics.host_object, tree, topics.devices)
        online = _is_online(topics, heard)
        if online and not force:
            raise RequestRefused(
                "not-allowed",
                f"the agent of {topics.host} is online and would publish them again: "
                "stop it, or give --force",
            )
        for _ in range(_MOST_PASSES):
            left = [topic for topic in _topics_of(topics, vm, found) if topic not in refused]
            if not left:
                break
            refused |= await client.clear(left)
            cleared |= dict.fromkeys(left)
            found = await client.retained(tree, topics.devices)
            if online:
                break
    stays = [] if online else [topic for topic in _topics_of(topics, vm, found) if topic in cleared]
    gone = [topic for topic in cleared if topic not in stays and topic not in refused]
    name = topics.host if vm is None else f"{topics.host}/{vm}"
    if as_json:
        terminal.print_json({"host": topics.host, "vm": vm, "online": online, "cleared": gone})
    else:
        for topic in gone:
            print(terminal.clean(f"cleared {topic}"))
        if not cleared:
            print(terminal.clean(f"nothing is retained of {name}{_known_hosts(topics.base, heard)}"))
    if failed := [*dict.fromkeys([*stays, *refused])]:
        reason = f" ({next(iter(refused.values()))})" if refused else ""
        terminal.print_error(
            terminal.clean(
                f"the broker did not clear {len(failed)} topics of {name}, {failed[0]} for one{reason}: "
                "does its ACL let this user write there?"
            )
        )
        return FAILED
    return DONE


def _is_online(topics: Topics, heard: Mapping[str, bytes]) -> bool:
    from qmpballoon.fleet import Fleet
    from qmpballoon.mqtt.topics import FleetTopics

    fleet = Fleet(FleetTopics(topics.base))
    for topic in (topics.status, topics.host_object):
        fleet.take(topic, heard.get(topic, b""), retained=True)
    return topics.host in fleet.hosts and fleet.hosts[topics.host].online


def _topics_of(topics: Topics, vm: str | None, found: Mapping[str, bytes]) -> list[str]:
    own = topics.tree(vm).removesuffix("#")
    return sorted({topic for topic in found if topic.startswith(own)} | devices_of(topics, vm, found))


def _known_hosts(base: str, heard: Mapping[str, bytes]) -> str:
    ends = f"{base}/", "/status"
    hosts = [topic[len(ends[0]) : -len(ends[1])] for topic in sorted(heard) if topic.endswith(ends[1])]
    hosts = [host for host in hosts if host and "/" not in host]
    if not hosts:
        return "; no host is known to this broker"
    return f"; hosts are {', '.join(hosts[:_MOST_NAMED])}" + (", ..." if len(hosts) > _MOST_NAMED else "")


def _name(text: str) -> tuple[str, str | None]:
    host, slash, vm = text.partition("/")
    if not host or (slash and not vm):
        raise argparse.ArgumentTypeError(f"{text!r} is neither HOST nor HOST/VM")
    if any(character in text for character in "*?["):
        raise argparse.ArgumentTypeError(f"{text!r} is a glob: name one host, or one of its VMs")
    return safe_name(host), safe_name(vm) if slash else None
