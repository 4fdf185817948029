"""The tree of the configuration: every table and key once, with its default, range and meaning.

The reader and the printed default file are made from this tree, so they always agree with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, TypeAlias, get_args

from qmpballoon.config import values
from qmpballoon.config.values import BrokerUrl, CgroupBudget, HttpAddress
from qmpballoon.model.records import MODES, POLICIES
from qmpballoon.readers import Reader, flag, number, text, whole
from qmpballoon.units import Amount, parse_amount

Budget: TypeAlias = Amount | CgroupBudget
CONTROL_NAME: Final = "agent.sock"

Protocol: TypeAlias = Literal["auto", "5", "3.1.1"]
PayloadFormat: TypeAlias = Literal["json", "msgpack"]


@dataclass(frozen=True, slots=True)
class Key:
    """The reader and description of one key."""

    read: Reader
    about: str  # its meaning, for the printed file
    example: str | None = None  # in TOML, for a key that has no default


def keys(record: type) -> dict[str, Key]:
    """Return every key of one of the records below, in the order of the file."""
    return {entry.name: entry.metadata["key"] for entry in fields(record) if "key" in entry.metadata}


def _key(read: Reader, about: str, default: Any, example: str | None = None) -> Any:
    return field(default=default, metadata={"key": Key(read, about, example)})


def _machine_key(read: Reader, about: str) -> Any:
    """Make a key whose default depends on the machine, so the record has none."""
    return field(metadata={"key": Key(read, about)})


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """``[agent]``."""

    host: str = _machine_key(text(255), "Name of this host in topics. Default: the host name.")
    state_dir: str = _machine_key(
        values.path_or_none,
        'Where names, limits and targets survive a restart; locked, one agent of a name. "": nowhere.\n'
        "Default: $STATE_DIRECTORY, else $XDG_STATE_HOME/qmpballoon, else ~/.local/state/qmpballoon.",
    )
    control: str | None = _key(
        values.control_socket,
        'Local control socket, for the command line beside the agent; "" turns it off. Who may open it (its\n'
        "mode is 0660, its group the agent's) may do all that the agent can. Default: agent.sock in\n"
        "$RUNTIME_DIRECTORY, else in state_dir.",
        None,
        '"/run/qmpballoon/agent.sock"',
    )
    on_exit: str = _key(
        values.word("keep", "release"),
        '"keep" leaves every balloon as it is;\n'
        '"release": a clean stop grows the automatic VMs as far as the reserve allows.',
        "keep",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoverySettings:
    """``[discovery]``."""

    sockets: tuple[str, ...] = _machine_key(
        values.several(values.socket_glob, "globs of absolute paths"),
        "Globs of QMP sockets, watched: a VM appears and vanishes without a restart. Also tcp:HOST:PORT,\n"
        "where nothing is known of the QEMU's process: neither pid nor RSS. Also @NAME, an abstract socket.\n"
        "To open a monitor is to take it from its owner: never name sockets that libvirt or Proxmox holds.",
    )
    allow_remote: bool = _key(
        flag,
        "Whether tcp:HOST:PORT may be another machine: a monitor has no password and no encryption.",
        False,
    )
    forget_after_s: float = _key(
        number(1, 31_536_000),
        "No socket and no process for so long, or nobody at an address of TCP: the VM's retained topics are\n"
        "cleared. 1 to 31536000.",
        86400.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttSettings:
    """``[mqtt]``. ``url`` empty: no MQTT. ``password_file`` is used only with a ``username``."""

    url: tuple[BrokerUrl, ...] = _key(
        values.several(values.broker_url, "broker URLs", least=1, or_one=True),
        "Broker: mqtt, mqtts, ws or wss; or a list, tried in turn. Default: none, no MQTT.\n"
        "Ports 1883, 8883, 80, 443 unless given; IPv6 in brackets; never a password in it.",
        (),
        '"mqtts://broker.example.org:8883"',
    )
    protocol: Protocol = _key(
        values.word(*get_args(Protocol)),
        '"auto": 5, and 3.1.1 where the broker refuses 5; or "5", "3.1.1".',
        "auto",
    )
    client_id: str | None = _key(text(128), "Default: qmpballoon-<host>.", None, '"qmpballoon-edge-7"')
    username: str | None = _key(text(255), "Needs a password: the next key.", None, '"edge-7"')
    password_file: str | None = _key(
        values.path,
        "File whose content is the password; one line end is cut off.\n"
        "Default: $CREDENTIALS_DIRECTORY/mqtt-password (a systemd credential), if there is one.",
        None,
        '"/etc/qmpballoon/mqtt-password"',
    )
    ca_file: str | None = _key(
        values.path,
        "Certificates (PEM) that the broker's is checked against. Default: those of the system.",
        None,
        '"/etc/qmpballoon/ca.pem"',
    )
    cert_file: str | None = _key(
        values.path,
        "Client certificate (PEM), where the broker asks for one.",
        None,
        '"/etc/qmpballoon/client.pem"',
    )
    key_file: str | None = _key(
        values.path, "Its private key, if it is not in the same file.", None, '"/etc/qmpballoon/client.key"'
    )
    base_topic: str = _key(values.topic, "All topics start with <base_topic>/<host>.", "qmpballoon")
    payload: PayloadFormat = _key(
        values.word(*get_args(PayloadFormat)), '"json" or "msgpack"; requests are taken in both.', "json"
    )
    heartbeat_s: float = _key(
        number(1, 3600), "Every state is published at least this often. 1 to 3600.", 60.0
    )
    min_interval_s: float = _key(
        number(0, 3600),
        "Least time between two states of one VM; the last value is always published. 0 to heartbeat_s.",
        1.0,
    )
    samples: bool = _key(flag, "Publish every tick's figures of all VMs, for recorders.", False)
    response_topics: tuple[str, ...] = _key(
        values.several(values.response_filter, "MQTT filters"),
        "MQTT 5 response topics that are honoured: filters with + and #; [] for none. Never below $,\n"
        "homeassistant, qmpballoon or base_topic. Other requests are answered on the agent's own topics.",
        ("#",),
    )
    home_assistant: bool | None = _key(
        flag,
        "Announce the host and its VMs to Home Assistant, which makes a device with its entities of each.\n"
        'Default: true, but false with payload = "msgpack", which Home Assistant does not read.',
        None,
        "true",
    )
    discovery_prefix: str = _key(
        values.topic,
        "Where Home Assistant looks for devices; the same as in its MQTT options.",
        "homeassistant",
    )

    @property
    def enabled(self) -> bool:
        """Whether a broker is configured."""
        return bool(self.url)

    @property
    def announces(self) -> bool:
        """Whether the host and its VMs are announced to Home Assistant."""
        return self.payload == "json" if self.home_assistant is None else self.home_assistant


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """``[http]``. ``listen`` None: there is no HTTP port."""

    listen: HttpAddress | None = _key(
        values.http_address,
        "Serve /metrics (Prometheus), /healthz and /readyz here: an IP address and a port, or a unix socket\n"
        '(mode 0660) as in "unix:/run/qmpballoon/http.sock". Needs the extra [metrics].\n'
        "Default: none.",
        None,
        '"127.0.0.1:9188"',
    )
    allow_remote: bool = _key(
        flag,
        "Allow an address that other machines can reach. There is neither a password nor encryption: a\n"
        "firewall decides who reads the figures.",
        False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """``[host]``; percentages are of MemTotal."""

    budget: Budget = _key(
        values.budget,
        "What all VMs together may hold: a share of MemTotal, a size, or a cgroup's memory.max less what is\n"
        'not guest memory ("cgroup:/machine.slice"; "cgroup:" is that of the agent). No more than a limit\n'
        "on the agent and all VMs leaves.",
        parse_amount("80%"),
    )
    reserve: Amount = _key(
        values.share_or_size,
        "Host memory (MemAvailable) that is never given to VMs: a size or a share of MemTotal. In a cgroup\n"
        "at most a tenth of its limit.",
        parse_amount("512MiB"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """``[policy]``."""

    name: str = _key(values.word(*POLICIES), f"One of {', '.join(POLICIES)}.", "fairshare")
    mode: str = _key(
        values.word(*MODES), "auto, manual, or observe: decides and publishes, moves nothing.", "auto"
    )
    overload: str = _key(
        values.word("guests", "host"),
        'What gives way when the needs exceed the budget: the "guests" or the "host".',
        "guests",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSettings:
    """``[vm]``, or the settings in force for one VM. Percentages are of the VM's size."""

    floor: Amount = _key(
        values.share_or_size,
        "The least that is ever asked for: a size or a share of the VM's size.",
        parse_amount("25%"),
    )
    ceiling: Amount = _key(
        values.share_or_size, "The most that is ever asked for. At least the floor.", parse_amount("100%")
    )
    shares: int = _key(whole(1, 1_000_000), "Relative claim when memory is short. 1 to 1000000.", 1000)
    stats_interval_s: int = _key(
        whole(1, 3600),
        "Time between two samples of a calm guest: whole seconds, 1 to 3600.",
        2,
    )
    fast_interval_s: float = _key(
        number(0.05, 3600, or_zero=True),
        "The same while a guest is thin, growing, new or being moved: 0.05 to stats_interval_s;\n"
        "0 turns it off.",
        0.2,
    )
    qmp_timeout_s: float = _key(
        number(0.1, 60), "A monitor that is silent for so long is unresponsive. 0.1 to 60.", 2.0
    )
    grace_s: float = _key(
        number(0, 600),
        "Fresh samples for so long after boot or reset, before a VM may shrink. 0 to 600.",
        3.0,
    )
    mode: str | None = _key(
        values.word(*MODES), "auto, manual or observe. Default: that of [policy].", None, '"manual"'
    )

    def limits(self, size: int) -> tuple[int, int]:
        """Return floor and ceiling in bytes for a VM of ``size`` bytes: floor <= ceiling <= size.

        A floor above the ceiling ("1GiB" of a VM of 512 MiB) is lowered to the ceiling.
        """
        ceiling = min(size, self.ceiling.of(size))
        return min(ceiling, self.floor.of(size)), ceiling


@dataclass(frozen=True, slots=True, kw_only=True)
class VmMatch:
    """The keys that only ``[[vm.match]]`` has; those that it shares with ``[vm]`` are in ``settings``."""

    name: str | None = _key(
        values.glob,
        "Glob on the name that QEMU claims. All of name, socket and owner that are given must fit. With\n"
        "socket or owner the name is reserved: a QEMU that claims it and does not fit gets another one.",
        None,
        '"db-*"',
    )
    socket: str | None = _key(
        values.match_socket_glob,
        'Glob on the socket\'s path; "/run/db/", with a / at the end: all in this directory.',
        None,
        '"/run/db/*.qmp"',
    )
    owner: int | None = _key(
        values.owner, "User (name or number) of the process that listens on the socket.", None, '"root"'
    )
    rename: str | None = _key(text(255), "Call the VM so.", None, '"db1"')
    settings: tuple[tuple[str, Any], ...] = ()
    """Names and values of the keys of VmSettings that this match sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """The whole, checked configuration. ``source`` is its file, or ``defaults``."""

    agent: AgentSettings
    discovery: DiscoverySettings
    mqtt: MqttSettings = MqttSettings()
    http: HttpSettings = HttpSettings()
    host: HostSettings = HostSettings()
    policy: PolicySettings = PolicySettings()
    vm: VmSettings = VmSettings()
    matches: tuple[VmMatch, ...] = ()
    source: str = "defaults"

    @property
    def control_path(self) -> str:
        """The path of the control socket; empty: there is none."""
        if self.agent.control is None:
            return self.agent.state_dir and f"{self.agent.state_dir}/{CONTROL_NAME}"
        return self.agent.control

    @property
    def client_id(self) -> str:
        """The MQTT client id: as configured, else ``qmpballoon-<host>``."""
        return self.mqtt.client_id or f"qmpballoon-{self.agent.host}"


TABLES: Final[dict[str, type]] = {
    "agent": AgentSettings,
    "discovery": DiscoverySettings,
    "mqtt": MqttSettings,
    "http": HttpSettings,
    "host": HostSettings,
    "policy": PolicySettings,
    "vm": VmSettings,
}
"""The tables of the file, in its order."""
