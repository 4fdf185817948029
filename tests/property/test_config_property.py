"""Configuration: any text is a configuration or a ConfigurationError; lines are correct or absent."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from qmpballoon import config
from qmpballoon.config import Configuration, Surroundings
from qmpballoon.config.toml_lines import key_lines
from qmpballoon.config.tree import TABLES, VmMatch, VmSettings, keys
from qmpballoon.errors import ConfigurationError, Problem
from qmpballoon.readers import dotted

HERE = Surroundings(host="edge-7", state_dir="/var/lib/qmpballoon", sockets=("/run/qmpballoon/*.qmp",))

PIECES = (
    *(
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        "=",
        ".",
        ",",
        "#",
        "\n",
        "\r\n",
        " ",
        '"',
        "'",
        '"""',
        "'''",
        "\\",
        "\\n",
    ),
    *(
        "agent",
        "vm",
        "match",
        "mqtt",
        "url",
        "host",
        "floor",
        "a",
        "1",
        "-1",
        "0.5",
        "true",
        "nan",
        "2026-01-01",
    ),
    *(
        '"50%"',
        "'/run/*.qmp'",
        "[[vm.match]]\n",
        "[vm]\n",
        "name = 'a'\n",
        "floor = '1GiB'\n",
        "\x00",
        "\u2028",
        "é",
    ),
)
TEXTS = st.text() | st.lists(st.sampled_from(PIECES), max_size=40).map("".join)

LIKELY_VALUES = st.sampled_from(
    [
        *(
            "keep",
            "release",
            "auto",
            "manual",
            "observe",
            "json",
            "msgpack",
            "5",
            "3.1.1",
            "fairshare",
            "host",
        ),
        *(
            "50%",
            "1GiB",
            "512M",
            "cgroup:/a",
            "mqtt://a",
            "mqtts://[::1]:1",
            "mqtt://u:p@h",
            "/run/*.qmp",
            "a[",
            "",
        ),
        *(0, 1, 2, 60, 1000, 2**60, -1, 0.1, 0.5, 1e300, float("inf"), float("nan"), True, False),
    ]
)
VALUES = st.recursive(
    LIKELY_VALUES
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.integers(-(2**70), 2**70)
    | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "name", "é x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def a_table(*records: type) -> st.SearchStrategy[dict[str, Any]]:
    known = [name for record in records for name in keys(record)]
    names = st.sampled_from([*known, "unknown", "flor", "a.b", "tab\tkey"])
    return st.dictionaries(names, VALUES, max_size=8)


TREES = st.fixed_dictionaries(
    {},
    optional={
        **{name: a_table(record) for name, record in TABLES.items() if name != "vm"},
        "vm": st.tuples(a_table(VmSettings), st.lists(a_table(VmMatch, VmSettings), max_size=3) | VALUES).map(
            lambda pair: {**pair[0], "match": pair[1]}
        ),
        "unknown": VALUES,
    },
)


def toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml(name)


def toml(value: object) -> str:
    """Write a value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_key(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(inner) for inner in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return re.sub(r"^(-?\d+)(e|$)", r"\1.0\2", repr(value))
    return str(value).lower()


def written(tree: dict[str, Any]) -> str:
    """Write a tree as people do: tables and arrays of tables, a key a line."""
    lines: list[str] = []
    lines += [f"{toml_key(name)} = {toml(content)}" for name, content in tree.items() if name == "unknown"]
    for name, content in tree.items():
        if name == "unknown":
            continue
        matches = content.get("match") if name == "vm" else None
        as_tables = matches and isinstance(matches, list) and all(isinstance(each, dict) for each in matches)
        lines.append(f"[{name}]")
        lines += [
            f"{toml_key(key)} = {toml(value)}"
            for key, value in content.items()
            if not (as_tables and key == "match")
        ]
        for each in matches if as_tables and matches else []:
            lines += ["[[vm.match]]", *(f"{toml_key(key)} = {toml(value)}" for key, value in each.items())]
    return "\n".join(lines) + "\n"


def parsed(text: str) -> Configuration | ConfigurationError:
    try:
        return config.parse(text, "agent.toml", surroundings=HERE)
    except ConfigurationError as error:
        return error


def last_key(problem: Problem) -> str:
    """Return the last bare key of a problem's path; "" if it is a quoted one."""
    found = re.search(r"(?:^|\.)([A-Za-z0-9_-]+)(\[\d+\])*$", problem.key)
    return found[1] if found else ""


def check(answer: Configuration | ConfigurationError, text: str) -> None:
    if isinstance(answer, Configuration):
        assert answer.vm.limits(2**30)[0] <= answer.vm.limits(2**30)[1] <= 2**30
        assert config.override(answer) == answer
        return
    assert answer.problems
    assert str(answer) == "\n".join(f"agent.toml: {problem}" for problem in answer.problems)
    assert len(str(answer).splitlines()) == len(answer.problems)
    lines = text.split("\n")
    for problem in answer.problems:
        assert problem.line is None or 1 <= problem.line <= len(lines)
        assert len(problem.reason) < 500


@given(TEXTS)
@example("a = 1" + "0" * 5000)
@example("a = " + "[" * 5000)
@example("[vm]\nfloor = 0x" + "f" * 5000)
def test_any_text_is_a_configuration_or_refused_with_all_its_problems(text: str) -> None:
    check(parsed(text), text)


@given(TREES)
def test_any_tree_is_a_configuration_or_refused_with_lines_that_contain_the_key(tree: dict[str, Any]) -> None:
    text = written(tree)
    assert json.dumps(tomllib.loads(text), sort_keys=True) == json.dumps(tree, sort_keys=True)
    answer = parsed(text)
    check(answer, text)
    if isinstance(answer, ConfigurationError):
        lines = text.split("\n")
        for problem in answer.problems:
            assert problem.line is not None
            assert last_key(problem) in lines[problem.line - 1]


@given(TEXTS)
def test_the_scan_never_raises_and_its_lines_contain_the_key(text: str) -> None:
    lines = text.split("\n")
    for path, line in key_lines(text).items():
        assert 1 <= line <= len(lines)
        segment = path[-1]
        if isinstance(segment, str) and "\\" not in lines[line - 1]:
            assert segment in lines[line - 1]


@given(TREES)
def test_every_key_of_valid_toml_has_a_line(tree: dict[str, Any]) -> None:
    text = written(tree)
    expected = paths_in(tomllib.loads(text))
    assert set(key_lines(text)) == expected


def paths_in(value: object, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    found = {path} if path else set()
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        found |= paths_in(each, (*path, name))
    return found


@given(st.lists(st.text() | st.integers(0, 99), min_size=1, max_size=4))
def test_a_path_is_printed_on_one_short_line(path: list[str | int]) -> None:
    printed = dotted(tuple(path))
    assert len(printed.splitlines()) <= 1
    assert printed.isprintable()


@given(st.text(), st.lists(st.text(), max_size=3), st.text(), st.text(), st.text())
def test_any_option_overrides_or_is_refused(
    host: str, sockets: list[str], broker: str, policy: str, budget: str
) -> None:
    base = config.parse("", surroundings=HERE)
    answer: Configuration | ConfigurationError
    try:
        answer = config.override(
            base, host=host, sockets=sockets, broker=broker, policy=policy, mode=policy, budget=budget
        )
    except ConfigurationError as error:
        answer = error
    if isinstance(answer, ConfigurationError):
        allowed = {"--host", "SOCKET_OR_GLOB", "--broker", "--policy", "--mode", "--budget"}
        assert {problem.key for problem in answer.problems} <= allowed
    else:
        assert answer.agent.host == host


@given(st.text(), st.text())
def test_any_name_and_path_has_settings(name: str, path: str) -> None:
    found = config.parse("[[vm.match]]\nname = '*'\nshares = 7\nrename = 'x'", surroundings=HERE)
    assert config.vm_settings(found, config.Claim(name, path)).shares == 7
    assert config.rename_for(found, config.Claim(name, path)) == "x"
