"""Start a VM on the host that has the most room for it: ask all hosts on a broker, then run a command.

python examples/start_where_room.py mqtt://broker 2GiB ssh '{host}' systemctl start vm@web2

``{host}`` in the command stands for the name of the chosen host. Exit status: that of the command, 1 if no
host has room, 3 if the broker cannot be reached. Two of these at once may choose the same host: run one.
"""

import asyncio
import sys

from qmpballoon import QmpBalloonError, parse_size
from qmpballoon.client import Client


async def room(client: Client, host: str, size: int) -> int | None:
    """Return how large a new VM may be on a host; None if this one does not fit, or no answer comes."""
    try:
        answer = await client.request(host, "room", size=size)
    except QmpBalloonError as error:
        print(f"{host}: {error}", file=sys.stderr)
        return None
    assert isinstance(answer, dict)
    return int(answer["room"]) if answer["fits"] else None


async def choose(broker: str, size: int) -> str | None:
    """Return the host with the most room for a VM of ``size`` bytes; None if there is none."""
    async with Client(broker, timeout_s=5) as client:
        online = [name for name, host in client.hosts.items() if host.online]
        rooms = await asyncio.gather(*(room(client, host, size) for host in online))
    fitting = [(each, host) for each, host in zip(rooms, online, strict=True) if each is not None]
    return max(fitting)[1] if fitting else None


async def start(broker: str, size: int, command: list[str]) -> int:
    """Choose a host, run the command, and return its exit status."""
    host = await choose(broker, size)
    if host is None:
        print(f"no host has room for {size} bytes", file=sys.stderr)
        return 1
    print(host, flush=True)
    process = await asyncio.create_subprocess_exec(*[word.replace("{host}", host) for word in command])
    return await process.wait()


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        sys.exit(asyncio.run(start(sys.argv[1], parse_size(sys.argv[2]), sys.argv[3:])))
    except QmpBalloonError as error:
        print(error, file=sys.stderr)
        sys.exit(3)
