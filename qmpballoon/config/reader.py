"""Makes the tree from TOML text or from values of the command line. Impure parts are in ``environment``."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from qmpballoon.addresses import is_file, refused_address
from qmpballoon.config.cross_checks import contradictions
from qmpballoon.config.environment import Surroundings, absolute, read_text, surroundings_here
from qmpballoon.config.toml_lines import LONGEST_KEY, KeyTooLong, key_line, key_lines
from qmpballoon.config.tree import (
    TABLES,
    AgentSettings,
    Configuration,
    DiscoverySettings,
    MqttSettings,
    VmMatch,
    VmSettings,
    keys,
)
from qmpballoon.errors import ConfigurationError, Problem
from qmpballoon.readers import (
    Fault,
    Path,
    Reader,
    Reading,
    did_you_mean,
    dotted,
    unknown_key,
)

COMMAND_LINE: Final = "command line"
_PLACE: Final = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$")


def load(path: str | os.PathLike[str], *, surroundings: Surroundings | None = None) -> Configuration:
    """Read and check a file; ``surroundings`` None: those of this process.

    Raises:
        ConfigurationError: it cannot be read, or is invalid; has all problems.
    """
    name = os.fspath(path)
    return parse(read_text(name), source=name, surroundings=surroundings)


def defaults(surroundings: Surroundings | None = None) -> Configuration:
    """Return the configuration of an empty file; ``surroundings`` None: those of this process."""
    here = surroundings or surroundings_here()
    return Configuration(
        agent=AgentSettings(host=here.host, state_dir=here.state_dir, control=here.control),
        discovery=DiscoverySettings(sockets=here.sockets),
        mqtt=MqttSettings(password_file=here.password_file),
    )


def parse(
    text: str, source: str = "configuration", *, surroundings: Surroundings | None = None
) -> Configuration:
    """Read and check the text of a file. Pure if ``surroundings`` are given.

    Raises:
        ConfigurationError: it is invalid; has all problems, each with its line and key.
    """
    try:
        lines = key_lines(text)  # first: it refuses keys that exhaust tomllib's memory
        document = tomllib.loads(text)
    except KeyTooLong as error:
        reason = f"a dotted key has more than {LONGEST_KEY} parts"
        raise ConfigurationError(source, [Problem(error.line, "", reason)]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(source, [_syntax_problem(text, str(error))]) from None
    except (ValueError, RecursionError):  # thousands of digits or brackets
        problem = Problem(None, "", "a number in it has too many digits, or values are nested too deeply")
        raise ConfigurationError(source, [problem]) from None
    reading = _Reading()
    config = reading.tree(document, defaults(surroundings), source)
    reading.contradictions_of(config)
    if reading.faults:
        problems = [
            Problem(key_line(lines, fault.path), dotted(fault.path), fault.reason) for fault in reading.faults
        ]
        problems.sort(key=lambda problem: problem.line or 0)
        raise ConfigurationError(source, problems)
    return config


def line_of(source: str, path: Path) -> int | None:
    """Return the line of a key in a file, None if it does not set the key or cannot be read any more."""
    try:
        lines = key_lines(read_text(source))
    except (ConfigurationError, KeyTooLong):
        return None
    return lines.get(path)


_OPTIONS: Final[dict[str, tuple[str, str]]] = {
    "host": ("agent", "host"),
    "state_dir": ("agent", "state_dir"),
    "control": ("agent", "control"),
    "sockets": ("discovery", "sockets"),
    "allow_remote": ("discovery", "allow_remote"),
    "broker": ("mqtt", "url"),
    "username": ("mqtt", "username"),
    "password_file": ("mqtt", "password_file"),
    "ca_file": ("mqtt", "ca_file"),
    "base_topic": ("mqtt", "base_topic"),
    "discovery_prefix": ("mqtt", "discovery_prefix"),
    "payload": ("mqtt", "payload"),
    "policy": ("policy", "name"),
    "mode": ("policy", "mode"),
    "budget": ("host", "budget"),
    "reserve": ("host", "reserve"),
}
_PATHS: Final = ("state_dir", "control", "sockets", "password_file", "ca_file")  # may be typed relative


def override(
    config: Configuration,
    *,
    host: str | None = None,
    state_dir: str | None = None,
    control: str | None = None,
    sockets: Sequence[str] | None = None,
    allow_remote: bool | None = None,
    broker: str | Sequence[str] | None = None,
    username: str | None = None,
    password_file: str | None = None,
    ca_file: str | None = None,
    base_topic: str | None = None,
    discovery_prefix: str | None = None,
    payload: str | None = None,
    policy: str | None = None,
    mode: str | None = None,
    budget: str | None = None,
    reserve: str | None = None,
) -> Configuration:
    """Return the configuration with the options of the command line; None: unchanged.

    An empty sequence of ``sockets`` or ``broker`` means unchanged, too. Relative paths are relative to
    the current directory.

    Raises:
        ConfigurationError: an option is invalid; the keys are options, such as ``--budget``.
    """
    given = locals()
    typed = {option: given[option] for option in _OPTIONS if given[option] not in (None, (), [])}
    reading = _Reading()
    changed: dict[str, dict[str, Any]] = {}
    for option, value in typed.items():
        table, key = _OPTIONS[option]
        if option in _PATHS:
            value = absolute(value) if isinstance(value, str) else [_absolute(each) for each in value]
        checked = reading.value(value, (table, key), keys(TABLES[table])[key].read)
        if checked is not None:
            changed.setdefault(table, {})[key] = checked
    for table, settings in changed.items():
        config = replace(config, **{table: replace(getattr(config, table), **settings)})
    reading.contradictions_of(config)
    if reading.faults:
        options = {path: option for option, path in _OPTIONS.items()}
        problems: list[Problem] = []
        for fault in reading.faults:
            option = options[str(fault.path[0]), str(fault.path[1])]
            flag = "SOCKET_OR_GLOB" if option == "sockets" else "--" + option.replace("_", "-")
            problems.append(Problem(None, flag, fault.reason))
        raise ConfigurationError(COMMAND_LINE, problems)
    return config


def _absolute(pattern: str) -> str:
    """Return a typed glob as an absolute one; an address that is no path is unchanged, to be refused."""
    is_path = os.path.lexists(pattern) or refused_address(pattern) is None
    return absolute(pattern) if is_path and is_file(pattern) else pattern


class _Reading(Reading):
    """Reads the tables of the file."""

    def unknown(self, path: Path, name: str, known: Collection[str]) -> None:
        """Add a fault for an unknown key, with the table where it belongs."""
        self.wrong(path, _unknown(name, known))

    def contradictions_of(self, config: Configuration) -> None:
        """Add a fault for each contradiction of values that are valid alone."""
        for found in contradictions(config):
            written = [path for path in found.keys if path in self.good]
            if written and not self.bad.intersection(found.keys):
                self.faults.append(Fault(written[0], found.reason))

    def tree(self, document: Mapping[str, Any], base: Configuration, source: str) -> Configuration:
        tables: dict[str, Any] = {}
        for name, content in document.items():
            if name not in TABLES:
                known = TABLES if _is_table(content) else ()
                self.wrong((name,), _unknown(name, known, what="table" if known else "key"))
            elif not _is_table(content):
                self.wrong((name,), f"must be a table: write [{name}]")
            elif name != "vm":
                checked = self.table(content, (name,), _readers(TABLES[name]))
                tables[name] = replace(getattr(base, name), **checked)
        vm = document.get("vm")
        if isinstance(vm, dict):
            own = {key: value for key, value in vm.items() if key != "match"}
            tables["vm"] = replace(base.vm, **self.table(own, ("vm",), _readers(VmSettings)))
            tables["matches"] = self.matches(vm.get("match", []))
        return replace(base, source=source, **tables)

    def matches(self, content: object) -> tuple[VmMatch, ...]:
        if not isinstance(content, list) or not all(_is_table(each) for each in content):
            self.wrong(("vm", "match"), "must be an array of tables: write [[vm.match]] in double brackets")
            return ()
        found: list[VmMatch] = []
        for index, each in enumerate(content):
            path: Path = ("vm", "match", index)
            checked = self.table(each, path, _readers(VmMatch, VmSettings))
            if not {"name", "socket", "owner"} & each.keys():
                self.wrong(path, "says no VM: give name, socket or owner")
            own = {key: checked.pop(key) for key in keys(VmMatch) if key in checked}
            found.append(VmMatch(**own, settings=tuple(checked.items())))
        return tuple(found)


def _readers(*records: type) -> dict[str, Reader]:
    return {name: key.read for record in records for name, key in keys(record).items()}


def _is_table(content: object) -> bool:
    return isinstance(content, dict)


def _unknown(name: str, known: Collection[str], what: str = "key") -> str:
    """Return the reason for an unknown key: where it belongs, or a similar known one."""
    if homes := [f"[{table}]" for table, record in TABLES.items() if name in keys(record)]:
        return f"unknown {what} here: it belongs in {' or '.join(homes)}"
    if not did_you_mean(name, known):
        for table, record in TABLES.items():
            if guess := did_you_mean(name, keys(record), quote='"'):
                return f"unknown {what} here{guess[:-1]} in [{table}]?"
    return unknown_key(name, known or TABLES, what=what, quote='"')


def _syntax_problem(text: str, message: str) -> Problem:
    """Take the line from tomllib's message, which ends in "(at line 3, column 5)"."""
    found = _PLACE.search(message)
    if found is None:
        return Problem(None, "", f"not TOML: {message[:200]}")
    line = int(found[1]) if found[1] else text.count("\n", 0, max(0, len(text) - 1)) + 1
    return Problem(line, "", f"not TOML: {message[: found.start()][:200]}")
