"""The lab: real QEMU guests and a real mosquitto, started and cleaned up for tests, demo and benchmarks.

The lab does not use the agent's code, so its reports about a guest can be used to check the agent::

    async with LabGuest(directory, image=await asyncio.to_thread(guest_image)) as guest:
        await guest.booted()
        await guest.command("hold 50")                    # MiB, held by a process in the guest
        assert await guest.monitor.actual() == guest.memory  # through a monitor of its own

The kernel kills every process when the thread that started it ends. Guests run under
TCG: no KVM, no privileges.
"""
