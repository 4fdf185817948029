"""Shrink a VM to half of its size, wait until the target is reached, and grow it again.

python examples/wait_for_balloon.py /run/qmpballoon/web1.qmp
"""

import asyncio
import sys

import qmpballoon


async def main(socket: str) -> None:
    """Shrink and grow the VM behind one socket."""
    async with qmpballoon.connect(socket) as vm:
        await vm.ready(timeout_s=30)
        target = await vm.set_target("50%", wait_s=10)
        state = await vm.state()
        print(f"{vm.name}: {state.actual} bytes, asked for {target}")
        if state.guest is not None:
            print(f"the guest has {state.guest.available} bytes available")
        await vm.set_target("100%", wait_s=10)


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1]))
    except qmpballoon.QmpBalloonError as error:
        sys.exit(str(error))
