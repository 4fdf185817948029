"""Whether this machine can run a configuration: the same checks at the agent's start, at a reload and in
``check-config``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from qmpballoon.cgroups import CgroupMemory, read_cgroup
from qmpballoon.config import (
    CgroupBudget,
    Configuration,
    HostSettings,
    MqttFiles,
    line_of,
    read_mqtt_files,
    readable_by_all,
    refused_path,
    unusable_directory,
    unusable_files,
    user_name,
    writable_by_others,
)
from qmpballoon.errors import ConfigurationError, Problem
from qmpballoon.log import log_always
from qmpballoon.procfs import read_host
from qmpballoon.protocol.payloads import HAS_MSGPACK
from qmpballoon.readers import Path, dotted
from qmpballoon.units import Amount, format_size

MOST_RESERVE: Final = 10  # in a cgroup, as a part of its limit: the usual reserve is made for whole hosts


@dataclass(frozen=True, slots=True)
class Finding:
    """What does not fit this machine. An agent refuses an error, and logs a warning and goes on."""

    path: Path
    reason: str
    is_error: bool = True
    file: str | None = None  # the file that the key names, if it is the cause

    def problem(self, source: str) -> Problem:
        """Return it with its line in the file ``source``."""
        return Problem(line_of(source, self.path), dotted(self.path), self.reason, self.file)


def check_usable(configuration: Configuration) -> MqttFiles:
    """Return the contents of the files for MQTT, after all checks; log the warnings.

    Raises:
        ConfigurationError: has all that makes the configuration unusable on this machine.
    """
    found = list(findings(configuration))
    _raise_errors(found, configuration.source)
    for each in found:
        key, file = dotted(each.path), each.file
        log_always("configuration", each.reason, key=key, file=file)
    return read_mqtt_files(configuration.mqtt)


def check_files(configuration: Configuration) -> None:
    """Check the files for MQTT alone.

    Raises:
        ConfigurationError: one of them cannot be used.
    """
    _raise_errors(list(_of_files(configuration)), configuration.source)


def _raise_errors(found: list[Finding], source: str) -> None:
    errors = [each.problem(source) for each in found if each.is_error]
    if errors:
        raise ConfigurationError(source, errors)


def findings(configuration: Configuration) -> Iterator[Finding]:
    """Yield everything that makes the configuration unusable or doubtful on this machine."""
    yield from _of_files(configuration)
    if configuration.mqtt.payload == "msgpack" and not HAS_MSGPACK:
        reason = 'the package msgpack is not installed here: use "json", or install msgpack'
        yield Finding(("mqtt", "payload"), reason)
    if configuration.http.listen is not None and find_spec("prometheus_client") is None:
        command = f"{sys.executable} -m pip install 'qmpballoon[metrics]'"
        reason = f"the package prometheus-client is not installed here: {command}"
        yield Finding(("http", "listen"), reason)
    if not configuration.discovery.sockets:
        reason = 'no VM can be found: name globs, such as "/run/qmpballoon/*.qmp"'
        yield Finding(("discovery", "sockets"), reason, is_error=False)
    for pattern in configuration.discovery.sockets:
        if (why := refused_path(pattern, allow_remote=configuration.discovery.allow_remote)) is not None:
            yield Finding(("discovery", "sockets"), why)
    if (unusable := unusable_directory(configuration.agent.state_dir)) is not None:
        yield Finding(("agent", "state_dir"), f"{unusable} ({_checked_as()})")
    yield from _of_memory(configuration)


def _of_files(configuration: Configuration) -> Iterator[Finding]:
    mqtt = configuration.mqtt
    for error in unusable_files(mqtt):
        for problem in error.problems:
            hint = f" ({_checked_as()})" if "denied" in problem.reason else ""
            yield Finding(tuple(problem.key.split(".")), problem.reason + hint, file=error.source)
    used = {"password_file": mqtt.password_file if mqtt.username is not None else None}
    if any(url.tls for url in mqtt.url):
        used |= {key: getattr(mqtt, key) for key in ("ca_file", "cert_file", "key_file")}
    for key, file in used.items():
        if file is not None and (why := writable_by_others(file)) is not None:
            yield Finding(("mqtt", key), why, file=file)
    for key in ("password_file", "key_file"):
        file = used.get(key)
        if file is not None and (why := readable_by_all(file)) is not None:
            yield Finding(("mqtt", key), why, is_error=False, file=file)
    source = configuration.source
    if (why := writable_by_others(source)) is not None:
        yield Finding((), why, is_error=False, file=source)


def _of_memory(configuration: Configuration) -> Iterator[Finding]:
    host, total = configuration.host, read_host().mem_total
    budget = host.budget
    if isinstance(budget, CgroupBudget):
        try:
            memory = read_cgroup(budget.path)
        except ValueError as error:
            yield Finding(("host", "budget"), str(error))
            return
        if memory is None:
            reason = f"no limit applies to {budget.group}: the VMs get the default share of the host"
            yield Finding(("host", "budget"), reason, is_error=False)
            return
        most = _for_guests(memory, host.reserve, total)
    elif total is None:
        return
    else:
        reserve = host.reserve.of(total)
        most = budget.of(total)
        here = f"this machine's {format_size(total)}"
        if reserve >= total:
            reason = f"{host.reserve} is all of {here}: no VM can grow"
            yield Finding(("host", "reserve"), reason, is_error=False)
        if most > total:
            yield Finding(("host", "budget"), f"{budget} is more than {here}", is_error=False)
        elif most + reserve > total and budget != HostSettings().budget:
            reason = (
                f"{budget} with the reserve of {host.reserve} is more than {here}: the reserve comes first"
            )
            yield Finding(("host", "budget"), reason, is_error=False)
    floors: list[tuple[Path, object]] = [(("vm", "floor"), configuration.vm.floor)]
    floors += [
        (("vm", "match", index, "floor"), dict(match.settings).get("floor"))
        for index, match in enumerate(configuration.matches)
    ]
    for path, floor in floors:
        if isinstance(floor, Amount) and not floor.relative and floor.of(None) > most:
            reason = f"{floor} for one VM is more than the budget of all, {format_size(most)}"
            yield Finding(path, reason, is_error=False)


def _for_guests(memory: CgroupMemory, reserve: Amount, total: int | None) -> int:
    """Return the most that guests can have of a cgroup."""
    kept = memory.limit if reserve.relative and total is None else reserve.of(total)
    return memory.limit - min(kept, memory.limit // MOST_RESERVE)


def _checked_as() -> str:
    return f"checked as user {user_name()}: the user that runs the agent counts"
