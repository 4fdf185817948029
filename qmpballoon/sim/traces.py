"""The built-in traces: one generator per kind of load or fault, each a function of a seed.

Unless a kind says otherwise the budget is 60 % of the VMs' sizes. The sum of the guests' needs is
below it most of the time, so that losses are due to the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import Final

from qmpballoon.sim.guest import Behaviour
from qmpballoon.sim.trace import Demand, Trace, TraceVm
from qmpballoon.units import MIB

DURATION_S: Final = 600.0
BUDGET: Final = 0.6  # of all sizes


class _Path:
    """A demand over time, in MiB, built segment by segment."""

    def __init__(self, anonymous: float, cache: float = 0.0) -> None:
        self.rows = [Demand(0.0, int(anonymous * MIB), int(cache * MIB))]
        self.anonymous, self.cache, self.at_s = anonymous, cache, 0.0

    def hold(self, for_s: float) -> _Path:
        """Keep the demand for some seconds."""
        return self.reach(self.anonymous, within_s=for_s)

    def until(self, at_s: float) -> _Path:
        """Keep the demand until a moment."""
        return self.hold(at_s - self.at_s) if at_s > self.at_s else self

    def reach(self, anonymous: float, *, within_s: float, cache: float | None = None) -> _Path:
        """Change linearly to another demand."""
        self.at_s += within_s
        self.anonymous, self.cache = anonymous, self.cache if cache is None else cache
        self.rows.append(Demand(round(self.at_s, 3), int(self.anonymous * MIB), int(self.cache * MIB)))
        return self

    def ramp(self, anonymous: float, *, mib_per_s: float) -> _Path:
        """Change to another demand at a rate."""
        return self.reach(anonymous, within_s=max(0.1, abs(anonymous - self.anonymous) / mib_per_s))

    def done(self) -> tuple[Demand, ...]:
        """Return the rows."""
        return tuple(self.rows)


def _vm(name: str, size_mib: int, path: _Path, *, floor: float = 0.25) -> TraceVm:
    size = size_mib * MIB
    return TraceVm(name=name, size=size, floor=int(size * floor), ceiling=size, demand=path.done())


def _trace(name: str, about: str, vms: list[TraceVm], *, budget: float = BUDGET) -> Trace:
    whole = sum(vm.size for vm in vms)
    return Trace(
        name=name,
        about=about,
        duration_s=DURATION_S,
        mem_total=int(whole * budget * 1.25),
        budget=int(whole * budget),
        vms=tuple(vms),
    )


def equilibrium(seed: int) -> Trace:
    """One guest starves beside idle ones while the host is exactly at its target."""
    random = Random(seed)
    vms = [_vm(f"idle{n}", 1024, _Path(random.uniform(90, 160), 40)) for n in range(1, 6)]
    path = _Path(380, 20).until(random.uniform(20, 40)).ramp(840, mib_per_s=random.uniform(4, 12))
    vms.append(_vm("starving", 1024, path))
    return _trace("equilibrium", "One guest starves beside five idle ones; the budget is used up.", vms)


def bursts(seed: int) -> Trace:
    """Guests grow fast for some seconds, one or two at a time."""
    random = Random(seed)
    paths = [_Path(random.uniform(100, 180), 30) for _ in range(8)]
    at_s = 10.0
    while at_s < DURATION_S - 70:
        path = random.choice([path for path in paths if path.at_s <= at_s])
        idle = path.anonymous
        path.until(at_s).ramp(random.uniform(500, 800), mib_per_s=random.uniform(15, 60))
        path.hold(random.uniform(10, 40)).ramp(idle, mib_per_s=200)
        at_s += random.uniform(8, 22)
    vms = [_vm(f"vm{n}", 1024, path) for n, path in enumerate(paths, 1)]
    return _trace("bursts", "Eight guests, of which one or two at a time grow by 15 to 60 MiB/s.", vms)


def square_waves(seed: int) -> Trace:
    """Two halves of the guests alternate."""
    random = Random(seed)
    period_s = random.uniform(90, 110)
    vms = []
    for n in range(8):
        high, low = random.uniform(520, 620), random.uniform(110, 170)
        half = n % 2
        path = _Path(low if half else high, 20)
        for turn in range(1, int(DURATION_S / period_s * 2) + 2):
            up = turn % 2 == half
            path.until(turn * period_s / 2 + (random.uniform(3, 8) if up else random.uniform(-3, 0)))
            path.ramp(high if up else low, mib_per_s=random.uniform(25, 50) if up else 300)
        vms.append(_vm(f"vm{n + 1}", 1024, path))
    return _trace("square-waves", "Eight guests; when one half needs much the other needs little.", vms)


def day_and_night(seed: int) -> Trace:
    """Slow waves: offices by day and batch jobs by night."""
    random = Random(seed)
    vms = []
    for n in range(8):
        shift, top = (0.0 if n < 4 else math.pi) + random.uniform(-0.3, 0.3), random.uniform(540, 640)
        path = _Path(200 + (top - 200) * (1 - math.cos(shift)) / 2, 60)
        for quarter in range(1, 61):
            wave = (1 - math.cos(shift + quarter / 60 * 4 * math.pi)) / 2
            path.reach(200 + (top - 200) * wave + random.uniform(-8, 8), within_s=10, cache=60 + 60 * wave)
        vms.append(_vm(f"{'office' if n < 4 else 'batch'}{n % 4 + 1}", 1024, path))
    return _trace("day-and-night", "Two days in ten minutes: four guests work by day and four by night.", vms)


def leak(seed: int) -> Trace:
    """One guest leaks slowly, until a restart of its service."""
    random = Random(seed)
    vms = [_vm(f"vm{n}", 1024, _Path(random.uniform(150, 350), 80)) for n in range(1, 6)]
    path = _Path(150, 40)
    while path.at_s < DURATION_S:
        path.ramp(random.uniform(760, 860), mib_per_s=random.uniform(1.5, 3)).ramp(150, mib_per_s=400).hold(
            20
        )
    return _trace(
        "leak",
        "One guest grows by 1.5 to 3 MiB/s until its service restarts.",
        [*vms, _vm("leaky", 1024, path)],
    )


def boot_storm(seed: int) -> Trace:
    """Guests boot one after the other on a host that was half empty; some reboot."""
    random = Random(seed)
    vms = []
    for n in range(10):
        boots_at_s = 0.0 if n < 4 else 30.0 + (n - 4) * random.uniform(3, 6)
        idle = random.uniform(90, 160)
        path = _Path(idle, 40).until(boots_at_s + 6).ramp(random.uniform(360, 460), mib_per_s=30)
        path.hold(random.uniform(15, 30)).ramp(idle, mib_per_s=60)
        resets = (random.uniform(200, 500),) if n % 3 == 0 else ()
        vm = replace(_vm(f"vm{n + 1}", 768, path), boots_at_s=boots_at_s, resets_at_s=resets)
        vms.append(vm)
    return _trace("boot-storm", "Six guests boot within half a minute beside four; some reboot later.", vms)


def broken(seed: int) -> Trace:
    """Guests whose balloons do not follow their targets, on a busy host."""
    random = Random(seed)
    vms = []
    cooperation = (
        Behaviour.SLOW,
        Behaviour.STUCK,
        Behaviour.INTERMITTENT,
        Behaviour.LIMITED,
        Behaviour.NO_DRIVER,
        Behaviour.FROZEN_STATS,
    )
    for behaviour in cooperation:
        path = _Path(random.uniform(150, 250), 40).until(random.uniform(60, 300))
        path.ramp(random.uniform(300, 380), mib_per_s=4)
        vm = _vm(behaviour.value, 768, path)
        vms.append(
            replace(vm, behaviour=behaviour, limit=480 * MIB if behaviour is Behaviour.LIMITED else None)
        )
    for n in range(4):
        path = _Path(random.uniform(120, 200), 40).until(random.uniform(20, 80))
        while path.at_s < DURATION_S:
            path.ramp(random.uniform(420, 520), mib_per_s=random.uniform(10, 30)).hold(30)
            path.ramp(random.uniform(120, 200), mib_per_s=200).hold(random.uniform(40, 120))
        vms.append(_vm(f"busy{n + 1}", 1024, path))
    return _trace(
        "broken", "Six guests with six kinds of faulty balloons beside four busy ones.", vms, budget=0.65
    )


def liars(seed: int) -> Trace:
    """Guests that report all or no memory as available, beside guests that need it."""
    random = Random(seed)
    vms = [
        replace(_vm("greedy1", 1024, _Path(120, 20)), behaviour=Behaviour.CLAIMS_ALL),
        replace(_vm("greedy2", 1024, _Path(160, 20)), behaviour=Behaviour.CLAIMS_ALL),
        replace(_vm("modest", 1024, _Path(180, 20), floor=0.35), behaviour=Behaviour.CLAIMS_NONE),
    ]
    for n in range(5):
        path = _Path(random.uniform(150, 220), 30).until(random.uniform(15, 60))
        while path.at_s < DURATION_S:
            path.ramp(random.uniform(450, 620), mib_per_s=random.uniform(8, 30)).hold(random.uniform(20, 50))
            path.ramp(random.uniform(150, 220), mib_per_s=200).hold(random.uniform(60, 150))
        vms.append(_vm(f"honest{n + 1}", 1024, path))
    return _trace(
        "liars",
        "Two guests report no available memory, one reports all as available, five report correctly.",
        vms,
    )


def file_servers(seed: int) -> Trace:
    """Page cache that is used beside anonymous memory that is needed."""
    random = Random(seed)
    vms = []
    for n in range(4):
        path = _Path(random.uniform(100, 140), 80)
        while path.at_s < DURATION_S:
            path.reach(path.anonymous, within_s=random.uniform(10, 25), cache=random.uniform(500, 750))
            path.hold(random.uniform(40, 80))
            path.reach(path.anonymous, within_s=5, cache=random.uniform(60, 120)).hold(random.uniform(20, 60))
        vms.append(_vm(f"files{n + 1}", 1024, path))
    for n in range(4):
        path = _Path(random.uniform(150, 220), 30).until(random.uniform(20, 90))
        while path.at_s < DURATION_S:
            path.ramp(random.uniform(450, 600), mib_per_s=random.uniform(10, 30)).hold(40)
            path.ramp(random.uniform(150, 220), mib_per_s=150).hold(random.uniform(50, 120))
        vms.append(_vm(f"app{n + 1}", 1024, path))
    return _trace("file-servers", "Four guests use large page caches, four others have bursts.", vms)


def unequal(seed: int) -> Trace:
    """Guests of very different sizes and shares."""
    random = Random(seed)
    vms = []
    for n, (size, shares) in enumerate(
        ((256, 1000), (256, 4000), (512, 1000), (1024, 500), (2048, 1000), (4096, 2000), (8192, 250)), 1
    ):
        low, high = size * 0.25 - 40, size * 0.62 - 40
        path = _Path(low, size * 0.03).until(random.uniform(10, 60))
        while path.at_s < DURATION_S:
            path.ramp(random.uniform(0.8, 1) * high, mib_per_s=size / random.uniform(30, 60))
            path.hold(random.uniform(20, 50)).ramp(low, mib_per_s=size / 5).hold(random.uniform(40, 110))
        vm = replace(_vm(f"vm{n}-{size}", size, path), shares=shares, deflate_on_oom=n % 2 == 0)
        vms.append(vm)
    return _trace("unequal", "Sizes from 256 MiB to 8 GiB and shares from 250 to 4000.", vms)


def floors(seed: int) -> Trace:
    """The sum of floors exceeds the budget; for some time the sum of needs does, too."""
    random = Random(seed)
    vms = []
    for n in range(6):
        path = _Path(random.uniform(180, 260), 30).until(20 + 75 * n + random.uniform(0, 30))
        path.ramp(random.uniform(570, 630), mib_per_s=10).hold(random.uniform(40, 90))
        path.ramp(random.uniform(180, 260), mib_per_s=100)
        vms.append(replace(_vm(f"vm{n + 1}", 1024, path, floor=0.7), deflate_on_oom=n % 2 == 0))
    return _trace("floors", "Six floors of 70 % on a budget of 60 %.", vms)


def many(seed: int) -> Trace:
    """A hundred small VMs."""
    random = Random(seed)
    vms = []
    for n in range(100):
        low = random.uniform(30, 60)
        path = _Path(low, 10).until(random.uniform(0, 200))
        while path.at_s < DURATION_S:
            path.ramp(random.uniform(100, 150), mib_per_s=random.uniform(3, 20)).hold(random.uniform(10, 40))
            path.ramp(low, mib_per_s=60).hold(random.uniform(80, 300))
        vm = _vm(f"vm{n + 1:03}", 256, path)
        vms.append(replace(vm, deflate_on_oom=n % 4 == 0))
    return _trace("many", "A hundred guests of 256 MiB with small bursts.", vms)


BUILT_IN: Final[Mapping[str, Callable[[int], Trace]]] = {
    "equilibrium": equilibrium,
    "bursts": bursts,
    "square-waves": square_waves,
    "day-and-night": day_and_night,
    "leak": leak,
    "boot-storm": boot_storm,
    "broken": broken,
    "liars": liars,
    "file-servers": file_servers,
    "unequal": unequal,
    "floors": floors,
    "many": many,
}
"""By name, in the order in which they are played."""


def built_in(name: str, seed: int) -> Trace:
    """Return a built-in trace; its name ends with the seed, as in ``bursts-2``.

    Raises:
        KeyError: there is none of that name.
    """
    trace = BUILT_IN[name](seed)
    return replace(trace, name=f"{name}-{seed}")
