"""Readers: which values they accept, and their reasons for the others."""

from __future__ import annotations

import pytest

from qmpballoon import readers
from qmpballoon.readers import Code, Fault, Reader, Reading, Wrong, did_you_mean, dotted, parts
from qmpballoon.units import parse_amount


@pytest.mark.parametrize(
    ("read", "value", "checked"),
    [
        (readers.flag, False, False),
        (readers.number(1, 5), 2, 2.0),
        (readers.number(1, 5, or_zero=True), 0, 0.0),
        (readers.whole(1, 5), 2.0, 2),
        (readers.word("a", "b"), "b", "b"),
        (readers.text(3), "a b", "a b"),
        (readers.amount, "50%", parse_amount("50%")),
        (readers.amount, 512, parse_amount(512)),
    ],
)
def test_a_valid_value_is_returned_in_its_type(read: Reader, value: object, checked: object) -> None:
    found = read(value)
    assert (found, type(found)) == (checked, type(checked))


@pytest.mark.parametrize(
    ("read", "value", "code", "reason"),
    [
        (readers.flag, 1, "malformed", "must be true or false, not the number 1"),
        (readers.number(1, 5), True, "malformed", "must be a number from 1 to 5, not true"),
        (
            readers.number(1, 5),
            float("nan"),
            "out-of-range",
            "must be a number from 1 to 5, not the number nan",
        ),
        (
            readers.number(0, 600, "seconds"),
            601,
            "out-of-range",
            "must be a number of seconds from 0 to 600, not the number 601",
        ),
        (readers.whole(1, 5), 1.5, "malformed", "must be a whole number from 1 to 5, not the number 1.5"),
        (
            readers.whole(1, 5),
            float("inf"),
            "malformed",
            "must be a whole number from 1 to 5, not the number inf",
        ),
        (
            readers.whole(1, 5),
            10**50,
            "out-of-range",
            "must be a whole number from 1 to 5, not a number of many digits",
        ),
        (
            readers.whole(1, 5, "bytes"),
            None,
            "malformed",
            "must be a whole number of bytes from 1 to 5, not null",
        ),
        (
            readers.word("auto", "manual"),
            "Manul",
            "malformed",
            "must be one of auto, manual, not the text 'Manul'; did you mean manual?",
        ),
        (readers.word("auto", "manual"), ["auto"], "malformed", "must be one of auto, manual, not an array"),
        (readers.text(3), "abcd", "malformed", "must have at most 3 characters, not 4"),
        (readers.text(3), "a\n", "malformed", "must not have control characters or line ends"),
        (
            readers.amount,
            "512M",
            "malformed",
            "the text '512M' is no size: write 512MiB (1024s) or 512MB (1000s)",
        ),
        (
            readers.amount,
            -1,
            "out-of-range",
            "must be more than zero and at most 2**53 bytes, not the number -1",
        ),
        (readers.amount, {}, "malformed", 'must be a size like "512MiB" or "50%", not a table'),
    ],
)
def test_an_invalid_value_is_refused_with_what_is_valid(
    read: Reader, value: object, code: Code, reason: str
) -> None:
    with pytest.raises(Wrong) as caught:
        read(value)
    assert (caught.value.reason, caught.value.code) == (reason, code)


def test_a_table_returns_the_valid_values_and_keeps_all_faults_with_their_paths() -> None:
    def rows(value: object) -> list[int]:
        assert isinstance(value, list)
        return parts((place, each, readers.whole(0, 9)) for place, each in enumerate(value))

    reading = Reading()
    found = reading.table(
        {"size": 1, "rows": [1, "x", 10], "siz": 3, "name": ""},
        ("vms", 0),
        {"size": readers.whole(0, 9), "rows": rows, "name": readers.text(9)},
    )
    assert found == {"size": 1}
    assert reading.faults == [
        Fault(("vms", 0, "rows", 1), "must be a whole number from 0 to 9, not the text 'x'"),
        Fault(("vms", 0, "rows", 2), "must be a whole number from 0 to 9, not the number 10", "out-of-range"),
        Fault(("vms", 0, "siz"), "unknown key; did you mean size?"),
        Fault(("vms", 0, "name"), "must not be empty"),
    ]
    assert reading.good == {("vms", 0, "size")}
    assert ("vms", 0, "rows") in reading.bad


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ((), ""),
        (("vm", "match", 1, "floor"), "vm.match[1].floor"),
        (("a b", 0, "\n"), r"'a b'[0].'\n'"),
    ],
)
def test_a_path_is_written_with_dots_and_brackets(path: readers.Path, written: str) -> None:
    assert dotted(path) == written


@pytest.mark.parametrize(
    ("word", "hint"),
    [("FLOR", "; did you mean floor?"), ("zzz", ""), ("floor" * 100, ""), ("", "")],
)
def test_a_similar_word_is_suggested(word: str, hint: str) -> None:
    assert did_you_mean(word, ["floor", "ceiling"]) == hint
