"""Divides memory by shares: the same number of bytes per share for all, within limits. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qmpballoon.units import PAGE

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Claim:
    """What one VM may get of an amount, in bytes: from ``least`` to ``most``, by ``shares``."""

    least: int
    most: int
    shares: int = 1000


def split(amount: int, claims: Sequence[Claim]) -> list[int]:
    """Return what each claim gets of ``amount`` bytes, in the order of the claims.

    All claims between their limits get the same number of bytes per share, in whole pages. If the sum of
    ``least`` exceeds the amount, each gets its ``least``. What exceeds the sum of ``most`` is left over.
    """
    given = sum(claim.least for claim in claims)
    if given >= amount:
        return [claim.least for claim in claims]
    bends = sorted(
        bend
        for claim in claims
        if claim.most > claim.least
        for bend in ((claim.least / claim.shares, claim.shares), (claim.most / claim.shares, -claim.shares))
    )
    level, filled, rising = 0.0, float(given), 0  # bytes per share; bytes; shares that rise with the level
    for bend, change in bends:
        step = (bend - level) * rising
        if filled + step >= amount:
            level += (amount - filled) / rising
            break
        level, filled, rising = bend, filled + step, rising + change
    else:
        return [max(claim.least, claim.most) for claim in claims]
    return [max(claim.least, min(claim.most, int(level * claim.shares) // PAGE * PAGE)) for claim in claims]


def water_fill(requested: Mapping[K, int], shares: Mapping[K, int], total: int) -> dict[K, int]:
    """Return the part of ``total`` for each: at most its request, at the same level per share for all.

    Requested amounts and ``total`` are in bytes; negative values count as zero.
    """
    gets = dict.fromkeys(requested, 0)
    unmet = {key: size for key, size in requested.items() if size > 0}
    left = max(0, total)
    if sum(unmet.values()) <= left:
        return gets | unmet
    # In the order of requested bytes per share: after one that is not met in full, no later one is.
    order = sorted(unmet, key=lambda key: unmet[key] / shares[key])
    weight = sum(shares[key] for key in order)
    for key in order:
        level = left / weight
        gets[key] = min(unmet[key], int(level * shares[key]))
        left -= gets[key]
        weight -= shares[key]
    return gets


def filled_in_tiers(tiers: tuple[Mapping[K, int], ...], shares: Mapping[K, int], total: int) -> dict[K, int]:
    """Return what each gets if all levels of a tier are filled before those of the next.

    A tier has the level in bytes up to which each is filled; a level that is reached already changes nothing.
    """
    gets = dict.fromkeys(tiers[0], 0)
    left = max(0, total)
    for levels in tiers:
        if not left:
            break
        lacks = {key: levels[key] - has for key, has in gets.items() if levels[key] > has}
        more = sum(lacks.values())
        if more <= left:
            gets.update({key: levels[key] for key in lacks})
            left -= more
            continue
        for key, size in water_fill(lacks, shares, left).items():
            gets[key] += size
            left -= size
    return gets
