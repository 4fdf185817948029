"""Conditions of ``wait``: what is one, and of which figures it is true."""

from __future__ import annotations

import pytest

from qmpballoon.condition import FIGURES, OF_GUEST, WORDS, InvalidCondition, parse_condition
from qmpballoon.errors import InvalidSize, OutOfRange
from qmpballoon.units import MIB


@pytest.mark.parametrize("word", WORDS)
def test_a_word_compares_no_figure(word: str) -> None:
    assert parse_condition(f" {word} ").figure is None
    assert str(parse_condition(word)) == word


@pytest.mark.parametrize(
    ("typed", "true_of", "false_of"),
    [
        ("available>200MiB", 200 * MIB + 1, 200 * MIB),
        ("available >= 200MiB", 200 * MIB, 200 * MIB - 1),
        ("available<200MiB", 200 * MIB - 1, 200 * MIB),
        ("available<=209715200", 200 * MIB, 200 * MIB + 1),
        ("available== 200 MiB", 200 * MIB, 200 * MIB + 1),
        ("available>50%", 512 * MIB + 1, 512 * MIB),
    ],
)
def test_each_operator_is_true_on_its_side_alone(typed: str, true_of: int, false_of: int) -> None:
    wanted = parse_condition(typed)
    assert wanted.is_true({"available": true_of, "size": 1024 * MIB})
    assert not wanted.is_true({"available": false_of, "size": 1024 * MIB})


@pytest.mark.parametrize("compares", [">", ">=", "<", "<=", "=="])
def test_nothing_is_true_of_an_unknown_figure(compares: str) -> None:
    assert not parse_condition(f"available{compares}1MiB").is_true({"available": None, "size": MIB})
    assert not parse_condition(f"available{compares}50%").is_true({"available": MIB, "size": None})


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_can_be_compared(figure: str) -> None:
    assert parse_condition(f"{figure}>=1B").is_true({figure: 1, "size": 1})


def test_the_figures_of_the_guest_are_figures() -> None:
    assert set(OF_GUEST) < set(FIGURES)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("", "write ready, reached, or compare"),
        ("redy", "did you mean ready"),
        ("available", "compare it with a size"),
        ("avialable>1MiB", "did you mean available"),
        ("swap>1MiB", "there are size, actual"),
        ("actual=1GiB", "write =="),
        ("actual!=1GiB", "compares nothing"),
        ("actual=>1GiB", "compares nothing"),
        ("actual>512M", "write 512MiB"),
        ("actual>", "such as actual>200MiB"),
        ("actual>1GiB and free>1GiB", "no size"),
    ],
)
def test_what_is_no_condition_is_refused_with_a_hint(typed: str, says: str) -> None:
    with pytest.raises((InvalidCondition, InvalidSize), match=says):
        parse_condition(typed)


@pytest.mark.parametrize("size", ["0", "-1MiB", "9007199254740993"])
def test_a_size_out_of_range_is_refused(size: str) -> None:
    with pytest.raises(OutOfRange):
        parse_condition(f"actual>{size}")
