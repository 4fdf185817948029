"""MQTT: the topics, what goes out on them, the requests that come in, and the connection to the broker.

``topics``, ``commands`` and ``dead_band`` are pure. ``outbox`` holds what waits to be sent,
``connection`` is one connection to one broker, ``bridge`` keeps one up, ``publisher``
decides when the state of a VM or of the host goes out.
"""
