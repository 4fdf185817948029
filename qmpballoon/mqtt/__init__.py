"""The MQTT side: what is published, what may be asked, and the connection to the broker.

``topics``, ``payloads``, ``objects``, ``arguments`` and ``significance`` are pure. ``outbox`` holds
what waits to be sent, ``desk`` answers requests, ``connection`` is one connection to one broker,
``bridge`` keeps one up for ever, ``publisher`` decides when a VM's or the host's state goes out.
"""
