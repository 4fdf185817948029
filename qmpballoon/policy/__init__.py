"""How large each guest should be: pure steps over frozen snapshots of the whole host.

The memory model. A VM has a *size*; its balloon takes some of it, the guest has *actual* left. What it
*held* cannot be taken without reclaim or kills: actual minus available, both of one moment. A VM
is *charged* against the host's budget with the larger of actual and target, since what was asked for
will come, and what is there may be used; with its size while no driver is up, since it may use all.

A policy knows nothing of QEMU, MQTT or clocks: time comes in the snapshot, memory between ticks is the
policy's frozen state, and decisions are data. The agent's governor and the simulator run the same code.
"""
