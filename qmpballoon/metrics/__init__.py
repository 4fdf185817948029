"""The agent's figures over HTTP: ``/metrics`` for Prometheus, ``/healthz`` and ``/readyz``.

``tally`` counts what passes by. ``families`` has every metric and makes the text. ``http_server`` serves a
few paths to clients that may be hostile. ``endpoint`` joins them. ``families`` alone imports
prometheus-client.
"""
