"""The QEMU side: monitor sockets, sessions on them, the balloon device, the sockets that come and go.

::

    discovery   which sockets are there                       globs, inotify, a scan as fall-back
    monitor     one socket file: open it, whose is it, who holds it
    session     one conversation over it                      on qemu.qmp's client
    balloon     the virtio balloon behind a session           device, size, guest statistics

A monitor serves one client at a time. Nothing here decides how large a guest should be.
"""
