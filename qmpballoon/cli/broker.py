"""The options of verbs that speak to a broker, and the client that they make."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qmpballoon.cli.arguments import seconds
from qmpballoon.config import COMMAND_LINE, defaults, load, override, read_password
from qmpballoon.errors import ConfigurationError, Problem

if TYPE_CHECKING:
    from qmpballoon.client import Client

VARIABLE: Final = "QMPBALLOON_BROKER"
ABOUT: Final = f"""\
The broker is that of --broker, of ${VARIABLE}, or of the file of -c, in this order. The other options
override the file.
"""


@dataclass(frozen=True, slots=True)
class BrokerAccess:
    """A client that is not connected yet, the start of all topics, and that of Home Assistant's."""

    client: Client
    base_topic: str
    discovery_prefix: str


def add_broker_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("broker")
    group.add_argument(
        "--broker",
        action="append",
        metavar="URL",
        help=f"mqtt://HOST, mqtts, ws or wss; given again: tried in turn (default: ${VARIABLE})",
    )
    group.add_argument("-c", "--config", metavar="FILE", help="configuration file of an agent (TOML)")
    group.add_argument("--username", metavar="NAME", help="with --password-file")
    group.add_argument("--password-file", metavar="FILE", help="file that holds the password")
    group.add_argument("--ca-file", metavar="FILE", help="certificates to check the broker's against (PEM)")
    group.add_argument("--base-topic", metavar="TOPIC", help="start of all topics (default: qmpballoon)")
    group.add_argument(
        "--timeout",
        type=seconds,
        default=10.0,
        metavar="S",
        help="wait so long for the broker (default: 10)",
    )


def broker_access(
    arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ, *, fleet: bool = False
) -> BrokerAccess:
    """Return the client that the options describe; ``fleet``: it follows the fleet.

    Raises:
        ConfigurationError: no broker is named, or the file or an option is invalid.
    """
    from qmpballoon.agent.usable import check_files  # these import MQTT and msgpack: not for --help
    from qmpballoon.client import Client

    configuration = load(arguments.config) if arguments.config else defaults()
    configuration = override(
        configuration,
        broker=arguments.broker or environment.get(VARIABLE) or None,
        username=arguments.username,
        password_file=arguments.password_file,
        ca_file=arguments.ca_file,
        base_topic=arguments.base_topic,
        discovery_prefix=getattr(arguments, "discovery_prefix", None),
    )
    mqtt = configuration.mqtt
    if not mqtt.enabled:
        reason = f"no broker is named: give --broker URL, set ${VARIABLE}, or give -c FILE"
        raise ConfigurationError(COMMAND_LINE, [Problem(None, "--broker", reason)])
    check_files(configuration)
    client = Client(
        mqtt.url,
        username=mqtt.username,
        password=read_password(mqtt),
        ca_file=mqtt.ca_file,
        cert_file=mqtt.cert_file,
        key_file=mqtt.key_file,
        timeout_s=arguments.timeout,
        base_topic=mqtt.base_topic,
        fleet=fleet,
    )
    return BrokerAccess(client, mqtt.base_topic, mqtt.discovery_prefix)
