"""The lab: real QEMU guests and a real mosquitto, started and cleaned up for tests, demo and benchmarks.

Nothing in here knows the agent, so what it reports about a guest can judge the agent's words::

    async with LabGuest(directory, image=await asyncio.to_thread(guest_image)) as guest:
        await guest.booted()
        await guest.command("hold 50")                    # MiB, held by a process in the guest
        assert await guest.monitor.actual() == guest.memory  # through a monitor of its own

Every process is started so that the kernel kills it when the thread that started it ends, however it
ends. Guests run under TCG: no KVM, no privileges.
"""
