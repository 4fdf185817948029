"""The dialect of each version; the contract tests compare the replies with recordings."""

from __future__ import annotations

import pytest

from qmpballoon.sim.qemu.dialect import DIALECTS, dialect_of


@pytest.mark.parametrize(
    ("version", "listed"),
    [
        ((2, 11, 0), (5, 2)),
        ((5, 2, 0), (5, 2)),
        ((7, 1, 0), (5, 2)),
        ((7, 2, 0), (7, 2)),
        ((9, 2, 4), (7, 2)),
        ((10, 0, 13), (10, 0)),
        ((11, 0, 9), (10, 0)),
        ((11, 1, 3), (11, 1)),
        ((12, 0, 0), (11, 1)),
    ],
)
def test_a_version_has_the_dialect_of_the_newest_listed_one_that_is_not_newer(
    version: tuple[int, int, int], listed: tuple[int, int]
) -> None:
    assert dialect_of(version) is DIALECTS[listed]
