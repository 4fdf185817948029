"""Simulated guests, and a QMP server over them that stands in for QEMU.

Three layers, each usable without the one above it:

``guest``    a guest with a balloon on a virtual clock: what it holds, how it moves, what it reports
``machine``  the QMP commands and events over such a guest; pure too
``server``   the wire: unix sockets, one client at a time, faults on demand

These import nothing of the agent but the sizes, so that they cannot share a defect with it. Their behaviour
was recorded from QEMU 7.2 with a Linux 6.1 guest; the tests compare the two.

A second group simulates a whole host on a virtual clock and runs workload traces under a policy:

``trace``    what guests ask for over time, as a file; ``traces`` generates the built-in ones
``vm``       a guest of a trace, and what an agent would know about it
``host``     samples, ticks, decisions carried out as by QEMU, accounts checked at every step
``figures``  the results; ``drawing`` draws them
"""
