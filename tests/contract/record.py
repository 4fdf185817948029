"""Records the conversations with the QEMU of this machine; run by hand when QEMU or they change.

    .venv/bin/python tests/contract/record.py

Writes ``recordings/qemu-<version>.jsonl``: a line per conversation, with its start, and one per text
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
from conversations import CONVERSATIONS, Conversation, without_volatile

QUIET_S = 0.4  # nothing more comes after so long: the second RESET of a reset comes after 50 ms


async def heard(wire: Wire) -> list[object]:
    """Return what comes until it is quiet; None at its end says that QEMU closed."""
    messages: list[object] = []
    try:
        while line := await wire.line(QUIET_S):
            message = without_volatile(json.loads(line))
            if message not in messages[-1:]:  # the firmware resets once or twice
                messages.append(message)
    except TimeoutError:
        return messages
    return [*messages, None]


async def record(conversation: Conversation, path: Path) -> tuple[str, list[str]]:
    """Hold one conversation; return QEMU's version and the lines of the recording."""
    first = {"conversation": conversation.name, "start": asdict(conversation.start)}
    async with running("real", path, conversation.start), Wire.connected(path) as wire:
        greeting = await heard(wire)
        said = [{"say": "", "hear": greeting}]
        for text in conversation.says:
            wire.send(text.encode())
            said.append({"say": text, "hear": await heard(wire)})
    version = json.loads(json.dumps(greeting))[0]["QMP"]["version"]["qemu"]
    return f"{version['major']}.{version['minor']}", [json.dumps(line) for line in (first, *said)]


async def main() -> None:
    """Record all."""
    lines = []
    version = ""
    with tempfile.TemporaryDirectory() as directory:
        for number, conversation in enumerate(CONVERSATIONS):
            version, more = await record(conversation, Path(directory) / f"{number}.qmp")
            lines += more
    target = Path(__file__).parent / "recordings" / f"qemu-{version}.jsonl"
    target.write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{target}: {len(lines)} lines\n")


if __name__ == "__main__":
    asyncio.run(main())
