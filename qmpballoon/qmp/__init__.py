"""The QEMU side: discovery of monitor sockets, QMP sessions, the balloon device.

::

    discovery   which sockets are there                       globs, inotify, a scan as fall-back
    monitor     one socket file: connect, the process behind it, whether another client holds it
    session     one conversation over it                      on qemu.qmp's client
    balloon     the virtio balloon behind a session           device, size, guest statistics

A monitor serves one client at a time. Nothing here decides how large a guest should be.
"""
