"""The simulated QEMU: a QMP server over a simulated guest, with faults on demand."""
