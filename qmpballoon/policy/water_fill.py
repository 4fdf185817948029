"""Sharing what is there: everybody up to his wish, the rest by shares. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")


def water_fill(wishes: Mapping[K, int], shares: Mapping[K, int], total: int) -> dict[K, int]:
    """Return how much each gets of ``total``: at most his wish, and the level per share is one for all.

    Wishes and ``total`` are in bytes; what is below zero counts as zero.
    """
    gets = dict.fromkeys(wishes, 0)
    open_wishes = {key: wish for key, wish in wishes.items() if wish > 0}
    left = max(0, total)
    if sum(open_wishes.values()) <= left:
        return gets | open_wishes
    # Fill in the order in which the wishes are met: once one cannot be, none after it can.
    order = sorted(open_wishes, key=lambda key: open_wishes[key] / shares[key])
    weight = sum(shares[key] for key in order)
    for key in order:
        level = left / weight
        gets[key] = min(open_wishes[key], int(level * shares[key]))
        left -= gets[key]
        weight -= shares[key]
    return gets


def filled_in_tiers(tiers: tuple[Mapping[K, int], ...], shares: Mapping[K, int], total: int) -> dict[K, int]:
    """Return what each gets if every tier's levels are filled before the next tier's.

    A tier holds the level in bytes up to which each is filled; a level below what he has already
    changes nothing.
    """
    gets = dict.fromkeys(tiers[0], 0)
    left = max(0, total)
    for levels in tiers:
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
