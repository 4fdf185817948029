"""Records the exchanges with the QEMU of this machine; run by hand when QEMU or they change.

    .venv/bin/python tests/contract/record.py

Writes ``recordings/qemu-<version>.jsonl``: a line per exchange, with its start, and one per text
that was sent, with the messages that came back in order. Volatile values are marked by their type.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from both_qemus import Wire, running
from exchanges import EXCHANGES, Exchange, without_volatile

LAST_AFTER_S = 0.4  # then no message follows: the second RESET of a reset comes after 50 ms


async def messages_of(wire: Wire) -> list[object]:
    """Return the messages until none follows; None at the end if QEMU closed the connection."""
    messages: list[object] = []
    try:
        while line := await wire.line(LAST_AFTER_S):
            message = without_volatile(json.loads(line))
            if message not in messages[-1:]:  # the firmware resets once or twice
                messages.append(message)
    except TimeoutError:
        return messages
    return [*messages, None]


async def record(exchange: Exchange, path: Path) -> tuple[str, list[str]]:
    """Run one exchange; return QEMU's version and the lines of the recording."""
    first = {"exchange": exchange.name, "start": asdict(exchange.start)}
    async with running("real", path, exchange.start), Wire.connected(path) as wire:
        greeting = await messages_of(wire)
        steps = [{"sent": "", "received": greeting}]
        for text in exchange.requests:
            wire.send(text.encode())
            steps.append({"sent": text, "received": await messages_of(wire)})
    version = json.loads(json.dumps(greeting))[0]["QMP"]["version"]["qemu"]
    return f"{version['major']}.{version['minor']}", [json.dumps(line) for line in (first, *steps)]


async def main() -> None:
    """Record all exchanges."""
    lines = []
    version = ""
    with tempfile.TemporaryDirectory() as directory:
        for number, exchange in enumerate(EXCHANGES):
            version, more = await record(exchange, Path(directory) / f"{number}.qmp")
            lines += more
    target = Path(__file__).parent / "recordings" / f"qemu-{version}.jsonl"
    target.write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{target}: {len(lines)} lines\n")


if __name__ == "__main__":
    asyncio.run(main())
