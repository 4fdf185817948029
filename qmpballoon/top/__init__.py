"""``top``: every host and VM on a broker, or of this machine, live on the whole terminal.

``rows``, ``columns``, ``history`` and ``picture`` are pure: what is shown, in which order, in which cells.
``app`` and its widgets draw it with Textual, an extra. A `Source` brings the hosts and VMs.
"""
