"""How large each guest should be: pure steps over frozen snapshots of the whole host.

The memory model. A VM has a *size*. Its balloon takes part of it; the rest is *actual*. *held* is actual
minus available, both from one sample: taking it causes reclaim or kills. A VM is *charged* against the host's
budget with the larger of actual and target, because it may use what it has and will get what was asked for.
While no driver is up it is charged with its size, because it may use all of it.

A policy does not depend on QEMU, MQTT or clocks. The snapshot contains the time, the policy's frozen state is
its only memory between ticks, and decisions are data. The agent's governor and the simulator run the same
code.
"""
