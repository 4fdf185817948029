"""MQTT: the topics, what is published on them, the requests that arrive, the connection to the broker.

``topics``, ``commands`` and ``dead_band`` are pure. ``outbox`` holds messages until they are sent,
``connection`` is one connection to one broker, ``bridge`` keeps one up, ``publisher`` decides when the
state of a VM or of the host is published.
"""
