"""One word for how a VM is: the first that is true, in the order of ``model.HEALTH_WORDS``. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Connection = Literal["offline", "unresponsive", "busy", "up"]

BOOT_S: Final = 60.0  # a guest whose driver is not up by then has none; Debian boots in 10 s even emulated
FIRST_SAMPLE_S: Final = 5.0  # a driver that is up has sent its first sample by then, or sends none
STALE_INTERVALS: Final = 3
STALE_S: Final = 5.0
MIGRATION_STATES: Final = ("inmigrate", "finish-migrate")


@dataclass(frozen=True, slots=True)
class Signs:
    """What a VM's health is read from; every time is seconds until now."""

    connection: Connection
    has_balloon: bool = True
    migrating: bool = False
    run_state: str | None = "running"
    driver_up: bool | None = None  # None: QEMU is not asked
    driver_reports: bool = True  # False: the driver did not take the statistics queue
    ever_reported: bool = True  # the guest sent statistics since QEMU started or it was reset
    since_boot_s: float = 0.0  # since the life began or the guest was reset; the later one
    since_driver_s: float = 0.0  # since the driver was seen to be up, or could have been
    sample_age_s: float | None = None  # None: no fresh sample on this connection since the last reset
    fresh_for_s: float | None = None  # since the first such sample
    grace_s: float = 3.0
    stats_interval_s: float = 2.0
    trouble: str | None = None  # untrusted, uncooperative or stuck, as the guard judges


def health_of(signs: Signs) -> str:
    """Return the health word for these signs."""
    if signs.connection != "up":
        return signs.connection
    if not signs.has_balloon:
        return "no-balloon"
    if signs.migrating or signs.run_state in MIGRATION_STATES:
        return "migrating"
    if signs.run_state != "running":
        return "paused"
    if signs.sample_age_s is None:
        return _without_sample(signs)
    if signs.fresh_for_s is not None and signs.fresh_for_s < signs.grace_s:
        return "starting"
    if signs.sample_age_s > max(STALE_INTERVALS * signs.stats_interval_s, STALE_S):
        return "stale"
    return signs.trouble or "ok"


def _without_sample(signs: Signs) -> str:
    driver_up = signs.ever_reported if signs.driver_up is None else signs.driver_up
    if not driver_up:
        return "starting" if signs.since_boot_s < BOOT_S else "no-driver"
    if signs.driver_reports and signs.since_driver_s < FIRST_SAMPLE_S:
        return "starting"
    return "no-stats"
