"""Sizes: parsing, rounding, formatting."""

from __future__ import annotations

from fractions import Fraction

import pytest

from qmpballoon.errors import InvalidSize, OutOfRange
from qmpballoon.model.tolerance import is_reached, tolerance
from qmpballoon.units import (
    GIB,
    KIB,
    MAX_SIZE,
    MIB,
    Size,
    format_size,
    parse_amount,
    parse_size,
    round_up_to_page,
)


@pytest.mark.parametrize(
    ("typed", "size"),
    [
        ("512MiB", 512 * MIB),
        ("1.5GiB", 1536 * MIB),
        ("500MB", 500_000_000),
        ("2kB", 2000),
        ("2KB", 2000),
        ("2KiB", 2 * KIB),
        ("1GB", 10**9),
        ("1TB", 10**12),
        ("1TiB", 1024 * GIB),
        ("512 MiB", 512 * MIB),
        ("512\tMiB", 512 * MIB),
        ("268435456", 268435456),
        ("268435456B", 268435456),
        ("256.0", 256),
        ("256.0 B", 256),
        ("007", 7),
        ("0.5KiB", 512),
        ("9007199254740992", MAX_SIZE),
        (268435456, 268435456),
        (256.0, 256),
        (1, 1),
    ],
)
def test_a_typed_size_is_these_bytes(typed: Size | float, size: int) -> None:
    assert parse_amount(typed).of(None) == size


@pytest.mark.parametrize(
    "typed",
    [
        "",
        " ",
        "MiB",
        "%",
        ".5GiB",
        "5.GiB",
        "+5MiB",
        "5e3",
        "0x10",
        "1_000",
        "1,5GiB",
        "512M",
        "512mib",
        "512 mIb",
        "512  MiB",
        " 512MiB",
        "512MiB ",
        "512MiB\n",
        "512\u00a0MiB",
        "٥MiB",
        "５１２MiB",
        "²MiB",
        "256.5",
        "256.5B",
        "nan",
        "inf",
        "1" * 65,
        "512MiB\x00",
        "\ud800",
    ],
)
def test_text_that_is_no_size_is_refused_with_its_text(typed: str) -> None:
    with pytest.raises(InvalidSize) as caught:
        parse_size(typed, whole=GIB)
    assert caught.value.code == "malformed"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "value", [True, False, None, b"5", [], {}, 5.5, float("nan"), float("inf"), -float("inf"), 1j, [10**5000]]
)
def test_a_value_that_is_neither_text_nor_whole_is_no_size(value: object) -> None:
    with pytest.raises(InvalidSize):
        parse_size(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "typed",
    [
        *("0", "0MiB", "0%", "-1", "-5MiB", "-0.5MiB", "9007199254740993", "9000TiB", "0.0001KiB"),
        *(0, -1, -1.0, MAX_SIZE + 1, 1e300),
        pytest.param(10**5000, id="many-digits"),
        pytest.param(-(10**5000), id="minus-many-digits"),
    ],
)
def test_a_valid_size_out_of_range_is_refused_as_such(typed: Size) -> None:
    with pytest.raises(OutOfRange) as caught:
        parse_size(typed, whole=GIB)
    assert caught.value.code == "out-of-range"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("512M", "write 512MiB (1024s) or 512MB (1000s)"),
        ("1.5g", "write 1.5GiB (1024s) or 1.5GB (1000s)"),
        ("512 k", "write 512KiB (1024s) or 512KB (1000s)"),
        ("512mib", "write 512MiB"),
        ("512GIB", "write 512GiB"),
        ("256.5", "a number without a unit is whole bytes"),
        ("a lot", "write a size like 512MiB, 1.5GiB, 500MB, 50% or a number of bytes"),
    ],
)
def test_the_refusal_has_a_hint(typed: str, hint: str) -> None:
    with pytest.raises(InvalidSize) as caught:
        parse_size(typed)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("typed", "whole", "size"),
    [("50%", GIB, GIB // 2), ("12.5 %", 800, 100), ("100%", 7, 7), ("0.4%", 1000, 4), ("150%", 100, 150)],
)
def test_a_percentage_is_a_share_of_the_whole(typed: str, whole: int, size: int) -> None:
    assert parse_size(typed, whole=whole) == size


def test_a_percentage_without_a_whole_is_refused() -> None:
    with pytest.raises(InvalidSize, match="a percentage has no meaning here"):
        parse_size("50%")


@pytest.mark.parametrize(("typed", "whole"), [("0.1%", 10), ("50%", 0), ("200%", MAX_SIZE)])
def test_a_percentage_that_comes_out_of_range_is_refused(typed: str, whole: int) -> None:
    with pytest.raises(OutOfRange):
        parse_size(typed, whole=whole)


def test_an_amount_keeps_its_text_and_its_exact_share() -> None:
    amount = parse_amount("33.3%")
    share = Fraction(amount.numerator, amount.denominator)
    assert (amount.relative, share, str(amount)) == (True, Fraction(333, 1000), "33.3%")
    assert str(parse_amount(4096)) == "4096"
    assert not parse_amount("1MiB").relative


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.50 KiB"),
        (268435456, "256 MiB"),
        (12 * MIB + MIB // 2, "12.5 MiB"),
        (1023 * KIB, "1023 KiB"),
        (1024 * KIB - 1, "1 MiB"),
        (2**53, "8192 TiB"),
        (-MIB, "-1 MiB"),
        (-(10**400), "-many TiB"),
    ],
)
def test_sizes_are_shown_in_the_unit_that_fits(size: int | None, shown: str) -> None:
    assert format_size(size) == shown


@pytest.mark.parametrize(("size", "rounded"), [(1, 4096), (4096, 4096), (4097, 8192), (0, 0)])
def test_a_target_is_rounded_up_to_pages_as_qemu_does(size: int, rounded: int) -> None:
    assert round_up_to_page(size) == rounded


def test_the_tolerance_is_half_a_percent_and_at_least_one_mebibyte() -> None:
    assert tolerance(64 * MIB) == MIB
    assert tolerance(200 * MIB) == MIB
    assert tolerance(2000 * MIB) == 10 * MIB


def test_a_target_is_reached_from_both_sides_within_the_tolerance() -> None:
    size, target = 128 * MIB, 64 * MIB
    assert is_reached(target + MIB, target, size)
    assert is_reached(target - MIB, target, size)
    assert not is_reached(target + MIB + 1, target, size)
    assert not is_reached(target - MIB - 1, target, size)
