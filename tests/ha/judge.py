"""Lets Home Assistant's own schemas judge messages; runs under its Python, not under ours.

Reads JSON lines ``[topic, payload]`` and prints one line for each complaint. Home Assistant itself drops keys
that it does not know without a word; here they are complaints.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import tempfile
from typing import Any

from homeassistant.components.mqtt import discovery, schemas  # type: ignore[import-not-found]
from homeassistant.core import HomeAssistant  # type: ignore[import-not-found]

vol: Any = importlib.import_module("voluptuous")  # newer releases put another package in its place


def complaints(topic: str, payload: str) -> list[str]:
    """Return what is wrong with one message."""
    match = discovery.TOPIC_MATCHER.fullmatch(topic.partition("/")[2])
    if match is None or match["component"] != "device":
        return ["the topic announces no device"]
    try:
        message: dict[str, Any] = schemas.DEVICE_DISCOVERY_SCHEMA(json.loads(payload))
    except (vol.Invalid, ValueError) as error:
        return [str(error)]
    found = [f"{key}: not known" for key in json.loads(payload).keys() - message.keys()]
    shared = {key: message[key] for key in schemas.SHARED_OPTIONS if key in message}
    for name, component in message["components"].items():
        options = dict(component)
        platform = importlib.import_module(f"homeassistant.components.mqtt.{options.pop('platform')}")
        if not options:
            continue  # it is removed
        try:
            platform.PLATFORM_SCHEMA_MODERN(
                {**shared, **options, "device": message["device"], "origin": message["origin"]}
            )
        except vol.Invalid as error:
            found.append(f"{name}: {error}")
    return found


async def main() -> int:
    """Judge all messages; return how many complaints there are."""
    with tempfile.TemporaryDirectory() as directory:
        HomeAssistant(directory)  # templates look for one
        found = [
            f"{topic}: {each}"
            for topic, text in map(json.loads, sys.stdin)
            for each in complaints(topic, text)
        ]
    print("\n".join(found))
    return len(found)


if __name__ == "__main__":
    sys.exit(min(100, asyncio.run(main())))
