"""Sizes: any input is a size in range, or refused with a documented error."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.errors import InvalidSize, OutOfRange
from qmpballoon.model.tolerance import is_reached
from qmpballoon.units import MAX_SIZE, format_size, parse_amount, parse_size, round_up_to_page

UNITS = ("", "B", "KiB", "MiB", "GiB", "TiB", "kB", "KB", "MB", "GB", "TB", "%")
WHOLES = st.none() | st.integers(0, MAX_SIZE)
SIZES = st.integers(1, MAX_SIZE)
LIKELY = st.from_regex(r"\A-?[0-9]{1,18}(\.[0-9]{1,9})?\s?([kKMGT]?i?B?|%)\Z")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | LIKELY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(JSON, WHOLES)
def test_any_value_is_a_size_in_range_or_refused(value: object, whole: int | None) -> None:
    answer: int | InvalidSize | OutOfRange
    try:
        answer = parse_size(value, whole=whole)  # type: ignore[arg-type]
    except (InvalidSize, OutOfRange) as error:
        answer = error
    if isinstance(answer, Exception):
        assert len(str(answer)) < 900
    else:
        assert type(answer) is int
        assert 1 <= answer <= MAX_SIZE


@given(SIZES)
def test_whole_bytes_are_not_changed(size: int) -> None:
    assert (
        parse_size(size) == parse_size(str(size)) == parse_size(f"{size}B") == parse_size(f"{size}.0") == size
    )


@given(st.integers(1, 10**6), st.sampled_from(UNITS[:-1]), st.sampled_from(["", " ", "\t"]))
def test_a_unit_multiplies(count: int, unit: str, gap: str) -> None:
    one = parse_size(f"1{unit}")
    if count * one <= MAX_SIZE:
        assert parse_size(f"{count}{gap}{unit}" if unit else str(count)) == count * one


@given(st.integers(1, 1000), st.integers(1000, MAX_SIZE))
def test_a_percentage_is_never_more_than_the_whole(permille: int, whole: int) -> None:
    size = parse_size(f"{permille / 10:.1f}%", whole=whole)
    assert abs(size - whole * permille / 1000) <= max(1, whole * 1e-12)
    assert 1 <= size <= whole


@given(st.integers(1, 10**8), st.integers(0, 9), st.integers(1000, MAX_SIZE))
def test_a_share_is_that_of_exact_fractions(digits: int, decimals: int, whole: int) -> None:
    exact = Fraction(digits, 10**decimals) / 100
    if not 1 <= round(exact * whole) <= MAX_SIZE:
        return
    text = f"{digits:0{decimals + 1}d}"
    written = f"{text[: len(text) - decimals]}.{text[len(text) - decimals :]}".rstrip(".")
    assert parse_size(f"{written}%", whole=whole) == round(exact * whole)
    assert parse_amount(f"{written}%").exceeds(parse_amount("50%")) is (exact > Fraction(1, 2))


@given(SIZES)
def test_an_amount_reads_its_own_text(size: int) -> None:
    amount = parse_amount(size)
    assert parse_amount(str(amount)) == amount


@given(SIZES)
def test_a_formatted_size_is_short_and_within_one_percent(size: int) -> None:
    shown = format_size(size)
    number, unit = shown.split(" ")
    assert len(shown) <= 8
    assert abs(float(number) * parse_size(f"1{unit}") - size) <= size * 0.01


@given(SIZES, SIZES)
def test_a_target_that_qemu_rounds_up_counts_as_reached(target: int, size: int) -> None:
    rounded = round_up_to_page(target)
    assert rounded % 4096 == 0
    assert target <= rounded < target + 4096
    assert is_reached(rounded, target, size)
