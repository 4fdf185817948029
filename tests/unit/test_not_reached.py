"""The sentence about a target that was not reached names the VM, both sizes and the likely cause."""

from __future__ import annotations

import pytest

from qmpballoon.not_reached import not_reached
from qmpballoon.units import MIB


@pytest.mark.parametrize(
    ("target", "available", "run_state", "driver_up", "cause"),
    [
        (96, 100, "paused", True, "the guest does not run (it is paused)"),
        (96, 100, "running", False, "no balloon driver is up in the guest (Linux: load virtio_balloon)"),
        (200, 5, "running", True, "its balloon driver is slow or stuck"),
        (96, 20, "running", True, "the guest has no more to give, with 20 MiB available"),
        (96, 55, "running", None, "the guest has no more to give, with 55 MiB available"),
        (
            96,
            100,
            "running",
            True,
            "its balloon driver is slow or stuck, with 100 MiB available in the guest",
        ),
        (96, None, None, None, "it sends no statistics, so it may hold the memory, or its balloon driver is"),
    ],
)
def test_the_likely_cause(
    target: int, available: int | None, run_state: str | None, driver_up: bool | None, cause: str
) -> None:
    sentence = not_reached(
        "web1",
        target=target * MIB,
        actual=128 * MIB,
        waited_s=10.0,
        available=None if available is None else available * MIB,
        run_state=run_state,
        driver_up=driver_up,
    )
    assert sentence.startswith(f"web1 is at 128 MiB after 10 s and did not reach {target} MiB: {cause}")
    assert sentence.endswith("; the target stays")
