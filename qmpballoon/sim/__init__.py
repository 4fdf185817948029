"""Simulated guests, and a QMP server over them that stands in for QEMU.

Three layers, each usable without the one above it:

``guest``    a guest with a balloon on a virtual clock: its memory, its driver, its statistics
``machine``  the QMP commands and events over such a guest; also pure
``server``   unix sockets, one client at a time, faults on demand

They import nothing of the agent but sizes, so that they cannot share a defect with it. Their behaviour
was recorded from QEMU 7.2 with a Linux 6.1 guest; the tests compare the two.

A second group simulates a whole host on a virtual clock and runs workload traces under a policy:

``trace``    the demand of guests over time, as a file; ``traces`` generates the built-in ones
``vm``       a guest of a trace, and what an agent would know about it
``host``     samples, ticks, execution of decisions, invariants checked at every step
``figures``  the results; ``drawing`` draws them
"""
