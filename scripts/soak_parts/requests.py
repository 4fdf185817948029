"""Requests of all verbs, a part of them malformed, drawn at random."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from qmpballoon.protocol.payloads import encode
from qmpballoon.units import MIB


@dataclass(frozen=True, slots=True)
class Drawn:
    """A request to publish; ``topic`` is below the host's root, ``wait_s`` what its answer may wait for."""

    topic: str
    payload: bytes
    wait_s: float = 0.0
    expiry_s: int | None = None
    content_type: str | None = None


_MALFORMED: Final = (
    b"{",
    b"\xff\xfe\x00",
    b"[1, 2]",
    b"null",
    b'{"transaction": ',
    b'{"transaction": {"a": [1, 2]}, "no-such-argument": true}',
    b'{"target": "1e400"}',
    b'{"target": -5}',
    b'{"target": true, "wait_s": "soon"}',
    b"\x81\xa6target",
    b"[" * 2000,
    b"x" * 70_000,
)


def draw(rng: random.Random, simulated: Sequence[str], real: Sequence[str], *, moving: bool) -> Drawn:
    """Draw a request; without ``moving``, one that changes no VM."""
    if rng.random() < 0.1:
        return _draw_malformed(rng, simulated)
    return _draw_moving(rng, simulated, real) if moving and rng.random() < 0.5 else _draw_calm(rng, simulated)


def _request(place: str, verb: str, may_take_s: float = 0.0, /, **arguments: Any) -> Drawn:
    return Drawn(f"{place}request/{verb}", json.dumps(arguments).encode(), may_take_s)


def _draw_malformed(rng: random.Random, simulated: Sequence[str]) -> Drawn:
    vm = rng.choice(simulated)
    match rng.randrange(4):
        case 0:
            return Drawn(f"vm/{vm}/request/no-such-verb", b"{}")
        case 1:
            return Drawn(f"vm/no-such-vm-{rng.randrange(50)}/request/get", b"{}")
        case 2:
            return Drawn(f"vm/{vm}/target/set", rng.choice(_MALFORMED))
        case _:
            verb = rng.choice(("set-target", "set-limits", "set-mode", "get"))
            return Drawn(f"vm/{vm}/request/{verb}", rng.choice(_MALFORMED))


def _draw_calm(rng: random.Random, simulated: Sequence[str]) -> Drawn:
    vm = f"vm/{rng.choice(simulated)}/"
    transaction = f"t{rng.randrange(10**9)}"
    match rng.randrange(8):
        case 0:
            return _request("", "list", transaction=transaction)
        case 6:
            return Drawn(f"{vm}request/{rng.choice(('get', 'why', 'doctor'))}", b"")
        case 7:
            return Drawn(f"request/{rng.choice(('list', 'doctor'))}", b"")
        case 1:
            return _request("", "release", hold="no-such-hold", transaction=transaction)
        case 2:
            return Drawn(
                f"{vm}request/get",
                encode({"transaction": transaction}, "msgpack"),
                content_type="application/msgpack",
            )
        case 3:
            return Drawn(f"{vm}request/get", b"{}", expiry_s=5)
        case _:
            return _request(vm, "get", transaction=transaction)


def _draw_moving(rng: random.Random, simulated: Sequence[str], real: Sequence[str]) -> Drawn:
    name = rng.choice(real) if real and rng.random() < 0.1 else rng.choice(simulated)
    least = 75 if name in real else 40  # percent; the real guests hold up to 85 of 160 MiB
    vm = f"vm/{name}/"
    match rng.randrange(10):
        case 0 | 1:
            wait_s = rng.choice((0, 1, 4))
            target = f"{rng.randint(least, 100)}%"
            return _request(vm, "set-target", wait_s, target=target, wait_s=wait_s)
        case 2:
            return Drawn(f"{vm}target/set", f"{rng.randint(least, 100)}%".encode())
        case 3 | 4:
            return Drawn(f"{vm}target/set", b"auto")
        case 5:
            return _request(vm, "set-mode", mode=rng.choice(("auto", "manual", "observe")), for_s=5)
        case 6:
            return _request(vm, "set-limits", shares=rng.randint(1, 2000), floor=None)
        case 7:
            size = rng.randint(1, 256) * MIB
            return _request("", "reclaim", 2, size=size, deadline_s=2, hold_s=3)
        case 8:
            return _request("", "set-policy", mode="auto", name="fairshare")
        case _:
            return _request("", "reload")
