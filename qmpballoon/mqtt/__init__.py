"""MQTT: the topics, what is published on them, the requests that arrive, the connection to the broker.

``topics``, ``commands`` and ``dead_band`` are pure. ``publisher`` decides when the state of a VM or of the
host is published. ``outbox`` and ``answers`` hold messages until they are sent, ``packets`` makes them fit
what the broker takes (``limits``, ``guesses``), ``sender`` sends them. ``inbox`` holds requests until they
are read by ``request_reader``. ``connection`` is one connection to one broker, ``bridge`` keeps one up.
"""
