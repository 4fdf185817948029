"""What a policy sees of a VM."""

from __future__ import annotations

import pytest

from qmpballoon.model.facts import BootFacts, Seen, VmFacts
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Limits
from qmpballoon.policy.guests import guest_of
from qmpballoon.units import MIB

SIZE = 1024 * MIB


def facts(seen: Seen, *, needs_grace: bool = False, rss: int = 300) -> VmFacts:
    return VmFacts(
        VmId("a"),
        seen=seen,
        boot=BootFacts(10.0, None, needs_grace),
        size=SIZE,
        rss=rss * MIB,
        target=256 * MIB,
        limits=Limits(128 * MIB, SIZE, 1000),
    )


@pytest.mark.parametrize(
    ("driver", "ever_reported", "needs_grace", "rss", "charge"),
    [
        (None, True, False, 200, 256),  # its driver was up when the agent came
        (None, True, False, 900, 900),  # and the guest may have been reset since
        (None, False, False, 200, 1024),  # a driver was never up
        (None, True, True, 200, 1024),  # it was reset
        (False, True, False, 200, 1024),  # QEMU reports that it is down
    ],
)
def test_a_guest_that_reported_before_the_agent_came_is_charged_as_it_stands(
    driver: bool | None, ever_reported: bool, needs_grace: bool, rss: int, charge: int
) -> None:
    seen = Seen(actual=256 * MIB, driver=driver, ever_reported=ever_reported)
    guest = guest_of(facts(seen, needs_grace=needs_grace, rss=rss))
    assert guest is not None
    assert guest.charge == charge * MIB
    assert guest.driver_up == (charge != 1024)
