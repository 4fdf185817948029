"""Lines of keys in TOML text."""

from __future__ import annotations

import tomllib

import pytest

from qmpballoon.config.toml_lines import LONGEST_KEY, KeyTooLong, key_line, key_lines
from qmpballoon.readers import Path

TRICKY = '''\
# [agent]
title = """
[agent]
host = "not here"
"""
[ agent . "sub table" ]   # a table
  host = 'a # b = c'
[agent]
a.b."c.d" = 1
a . b . e = { x = 1, "y" = [ { z = 2 }, { z = 3 } ] }
list = [   # [vm]
  "]", # ]
  """
  , still = the same text \\""" """, [ 1,
    2 ],
]
when = 1979-05-27 07:32:00  # a date with a space
quotes = """a""""" # three, and two that belong to it
last = \'\'\'
x = 1\'\'\'
[[vm.match]]
name = "one"
[[vm.match]]
name = "two"
[vm.match.sub]
"" = 0
[[vm.match.list]]
a = 1
[[vm.match.list]]
a = 2
'''


def paths_in(value: object, path: Path = ()) -> set[Path]:
    found = {path} if path else set()
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= paths_in(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found |= paths_in(inner, (*path, index))
    return found


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 2),
        (("agent",), 6),
        (("agent", "sub table"), 6),
        (("agent", "sub table", "host"), 7),
        (("agent", "a", "b", "c.d"), 9),
        (("agent", "a"), 9),
        (("agent", "a", "b", "e", "x"), 10),
        (("agent", "a", "b", "e", "y", 1, "z"), 10),
        (("agent", "list"), 11),
        (("agent", "list", 0), 12),
        (("agent", "list", 1), 13),
        (("agent", "list", 2), 14),
        (("agent", "list", 2, 1), 15),
        (("agent", "when"), 17),
        (("agent", "quotes"), 18),
        (("agent", "last"), 19),
        (("vm", "match", 0), 21),
        (("vm", "match", 0, "name"), 22),
        (("vm", "match", 1), 23),
        (("vm", "match", 1, "name"), 24),
        (("vm", "match", 1, "sub"), 25),
        (("vm", "match", 1, "sub", ""), 26),
        (("vm", "match", 1, "list", 1, "a"), 30),
    ],
)
def test_a_key_is_found_in_any_context(path: Path, line: int) -> None:
    assert key_lines(TRICKY)[path] == line


def test_every_key_and_element_of_a_document_is_found() -> None:
    assert set(key_lines(TRICKY)) == paths_in(tomllib.loads(TRICKY))


def test_crlf_and_unicode_separators_do_not_shift_the_lines() -> None:
    assert key_lines("a = 1\r\n# \x85 \u2028\r\nb = 2\r\n") == {("a",): 1, ("b",): 3}


def test_an_escaped_key_is_found_under_its_real_name() -> None:
    assert key_lines('"\\u0061\\"" = 1') == {('a"',): 1}


@pytest.mark.parametrize(
    "text", ["a = 1\nb ? 2\nc = 3", 'a = 1\n"b = 2', "a = 1\n[x", "a = 1\nb = [1 2]", "a = 1\nb = = 1"]
)
def test_the_scan_ends_at_invalid_toml(text: str) -> None:
    lines = key_lines(text)
    assert lines[("a",)] == 1
    assert ("c",) not in lines


def test_deep_nesting_ends_the_scan() -> None:
    lines = key_lines("a = 1\nb = " + "[" * 100_000)
    assert lines[("a",)] == 1


def test_a_key_of_too_many_segments_is_refused_and_one_less_is_not() -> None:
    assert len(key_lines("a." * (LONGEST_KEY - 1) + "a = 1")) == LONGEST_KEY
    with pytest.raises(KeyTooLong, match="line 2"):
        key_lines("x = 1\n" + "a." * LONGEST_KEY + "a = 1")


def test_a_missing_path_has_the_line_of_its_table_or_none() -> None:
    lines = key_lines("[a]\nb = 1\n")
    assert key_line(lines, ("a", "b")) == 2
    assert key_line(lines, ("a", "c")) == 1
    assert key_line(lines, ("d",)) is None
