"""Subscriptions that a broker refused are asked for again.

A SUBACK of MQTT 3.1.1 has one code for every failure: a cluster may answer with it while it elects a leader,
a broker with an ACL does as long as the ACL stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from qmpballoon.mqtt.connection import Connection

AGAIN_S: Final = 1.0
LONGEST_S: Final = 60.0


async def subscribe_again(
    connection: Connection, refused: list[str], granted: Callable[[list[str]], None]
) -> None:
    """Ask for filters, more and more seldom, until all are granted; ``granted`` is told which.

    Raises:
        aiomqtt.MqttError: the connection is lost, or no answer in time.
    """
    pause_s = AGAIN_S
    while refused:
        await asyncio.sleep(pause_s)
        pause_s = min(LONGEST_S, 2 * pause_s)
        left = await connection.subscribe(tuple(refused))
        if now := [one for one in refused if one not in left]:
            granted(now)
        refused = left


async def subscribe_in_time(connection: Connection, filters: tuple[str, ...], timeout_s: float) -> list[str]:
    """Subscribe, with what is retained; over MQTT 3.1.1 ask again for what is refused, for ``timeout_s``.

    Returns:
        The filters that the broker refused to the end.

    Raises:
        aiomqtt.MqttError: the connection is lost, or no answer in time.
    """
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + timeout_s
    refused = await connection.subscribe(filters, retained=True)
    while refused and not connection.mqtt5 and loop.time() + AGAIN_S < ends_s:
        await asyncio.sleep(AGAIN_S)
        refused = await connection.subscribe(tuple(refused), retained=True)
    return refused
