"""Events and log lines about the host: alarms begin and end."""

from __future__ import annotations

from pathlib import Path

import pytest
from policy_makers import a_guest, a_host

from qmpballoon.agent import host_monitor as host_monitor_module
from qmpballoon.agent.feed import Feed
from qmpballoon.agent.host_monitor import HostMonitor
from qmpballoon.config import CgroupBudget, HostSettings
from qmpballoon.model.records import Event
from qmpballoon.policy.host_level import needs
from qmpballoon.policy.snapshot import Snapshot
from qmpballoon.units import MIB, parse_amount

FLOORS = "the floors of the VMs together exceed the budget"
NEEDS = "what the guests hold exceeds the budget"


class _Listener(Feed):
    """Records the host's alarms."""

    def __init__(self) -> None:
        super().__init__()
        self.alarms: list[tuple[str, object]] = []

    def host_event(self, event: Event) -> None:
        if event.event.startswith("alarm"):
            assert event.data.keys() == {"reason", "budget", "lent"}
            self.alarms.append((event.event, event.data["reason"]))


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The event names in the log."""
    words: list[str] = []

    def log_event(word: str, *_: object, **__: object) -> None:
        if word.startswith("alarm"):
            words.append(word)

    monkeypatch.setattr(host_monitor_module, "log_event", log_event)
    return words


def holding(mib: int, **more: int) -> Snapshot:
    """Return a host whose one guest holds so much."""
    return a_host(a_guest(available=1024 - mib), **more)


def alarms_of(*snapshots: Snapshot) -> list[tuple[str, object]]:
    listener = _Listener()
    monitor = HostMonitor(listener)
    for snapshot in snapshots:
        monitor.judge(snapshot, lent=0)
    return listener.alarms


def test_each_alarm_ends(words: list[str]) -> None:
    calm, short = holding(200, budget=900), holding(950, budget=900)
    assert (
        alarms_of(calm, short, short, calm, calm, short, calm)
        == [("alarm", NEEDS), ("alarm-over", NEEDS)] * 2
    )
    assert words == ["alarm", "alarm-over"] * 2


@pytest.mark.usefixtures("words")
def test_one_alarm_ends_before_another_begins() -> None:
    needed, floors = holding(950, budget=900), holding(200, budget=100)
    assert alarms_of(needed, floors, holding(200, budget=900)) == [
        ("alarm", NEEDS),
        ("alarm-over", NEEDS),
        ("alarm", FLOORS),
        ("alarm-over", FLOORS),
    ]


@pytest.mark.usefixtures("words")
def test_a_host_without_guests_has_no_alarm() -> None:
    assert alarms_of(holding(950, budget=900), a_host(budget=900)) == [
        ("alarm", NEEDS),
        ("alarm-over", NEEDS),
    ]


@pytest.mark.usefixtures("words")
def test_an_alarm_has_hysteresis() -> None:
    needed = needs(holding(600)) // MIB
    above, just_below, well_below = needed - 1, needed + 10, needed * 107 // 100
    budgets = (above, just_below, above, just_below, well_below, just_below)
    assert alarms_of(*(holding(600, budget=budget) for budget in budgets)) == [
        ("alarm", NEEDS),
        ("alarm-over", NEEDS),
    ]


@pytest.mark.usefixtures("words")
def test_the_host_shows_the_alarm_while_it_lasts() -> None:
    monitor = HostMonitor(_Listener())
    shown = []
    for budget in (2000, 900, 2000):
        monitor.judge(holding(950, budget=budget), lent=0)
        status = monitor.status(a_host(), [], policy="fairshare", mode="auto", unidentified=(), holds=())
        shown.append(status.alarms)
    assert shown == [(), (NEEDS,), ()]


def test_late_sampling_is_logged_once_and_shown_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(host_monitor_module, "log_event", lambda word, *_, **__: logged.append(word))
    monitor = HostMonitor(_Listener())
    shown = []
    for late_s in (0.1, 0.9, 1.04, 3.0, 0.3, 1.2, 0.2, 0.0):
        monitor.note_lateness(late_s)
        status = monitor.status(a_host(), [], policy="fairshare", mode="auto", unidentified=(), holds=())
        shown.append(status.sampling_late_s)
    assert logged == ["sampling-late", "sampling-in-time"]
    assert shown == [0.0, 0.9, 1.0, 3.0, 0.3, 1.2, 0.0, 0.0]


QEMUS: dict[int | None, int] = {71: 256 * MIB, 72: 256 * MIB}  # what each is charged, by pid


class _Machine:
    """A host of 8 GiB with one cgroup of version 2, as files; sizes in MiB."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proc, self.cgroups = directory / "proc", directory / "cgroups"
        self.group = self.cgroups / "vms"
        self.logged: list[str] = []
        self.rss = dict.fromkeys(QEMUS, 150)
        for name in ("self", *QEMUS):
            self.move(str(name), "/vms")
        self.group.mkdir(parents=True)
        (self.proc / "meminfo").write_text(f"MemTotal: {8192 * 1024} kB\nMemAvailable: {4096 * 1024} kB\n")
        (self.proc / "pressure").mkdir()
        (self.proc / "pressure/memory").write_text("some avg10=1.00\nfull avg10=1.00\n")
        self.limit(560, current=400)
        monkeypatch.setattr(host_monitor_module, "rss_of", lambda pid: self.rss[pid] * MIB)
        monkeypatch.setattr(host_monitor_module, "log_event", lambda word, *_, **__: self.logged.append(word))
        self.monitor = HostMonitor(Feed(), proc=str(self.proc), cgroups=str(self.cgroups))

    def move(self, process: str, path: str) -> None:
        (self.proc / process).mkdir(parents=True, exist_ok=True)
        (self.proc / process / "cgroup").write_text(f"0::{path}\n")

    def limit(self, limit: int | None, *, current: int) -> None:
        (self.group / "memory.max").write_text("max" if limit is None else str(limit * MIB))
        (self.group / "memory.current").write_text(str(current * MIB))
        (self.group / "memory.stat").write_text(f"inactive_file {20 * MIB}\n")

    def look(self, budget: str = "cgroup:/vms", **settings: str) -> tuple[int, int, int]:
        """Update the monitor; return the budget, the reserve and the available memory, in MiB."""
        source = CgroupBudget("/vms") if budget == "cgroup:/vms" else parse_amount(budget)
        reserve = {name: parse_amount(size) for name, size in settings.items()}
        self.monitor.look(HostSettings(budget=source, **reserve), lambda: QEMUS)
        assert self.monitor.budget is not None
        assert self.monitor.sample.mem_available is not None
        return (
            self.monitor.budget // MIB,
            self.monitor.reserve // MIB,
            self.monitor.sample.mem_available // MIB,
        )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Machine:
    return _Machine(tmp_path, monkeypatch)


WHOLE_HOST = (8192 * 8 // 10, 512, 4096)


def test_the_budget_of_a_cgroup_is_what_is_left_for_guests(machine: _Machine) -> None:
    others = 400 - 20 - 2 * (150 - 32)
    assert machine.look() == (560 - others - 56, 56, 560 - 380)
    assert machine.look(reserve="16MiB") == (560 - others - 16, 16, 560 - 380)
    assert machine.monitor.for_guests == (560 - others) * MIB
    assert machine.monitor.sample.mem_total == 560 * MIB
    assert machine.logged == ["budget-limited"]


def test_the_cgroup_of_the_agent_counts_wherever_its_vms_are(machine: _Machine) -> None:
    machine.move("self", "/vms")
    own = HostSettings(budget=CgroupBudget(""))
    machine.monitor.look(own, lambda: {None: 2 * 118 * MIB})
    assert machine.monitor.for_guests == (560 - (400 - 20 - 2 * 118)) * MIB
    machine.limit(None, current=400)
    machine.monitor.look(own, lambda: QEMUS)
    assert machine.logged == ["budget-limited", "budget-unlimited"]


def test_more_of_a_qemu_than_its_guest_may_have_is_not_the_guests(machine: _Machine) -> None:
    machine.rss = dict.fromkeys(QEMUS, 256 + 70)
    machine.limit(800, current=700)
    assert machine.look(reserve="16MiB")[0] == 800 - (680 - 2 * 256) - 16


def test_guests_of_unknown_processes_count_by_what_they_hold(machine: _Machine) -> None:
    behind_a_proxy: dict[int | None, int] = {None: 2 * 118 * MIB}
    machine.monitor.look(HostSettings(budget=CgroupBudget("/vms")), lambda: behind_a_proxy)
    assert machine.monitor.for_guests == (560 - (400 - 20 - 2 * 118)) * MIB


def test_a_limit_that_changes_changes_the_budget(machine: _Machine) -> None:
    before = machine.look()[0]
    machine.limit(660, current=400)
    assert machine.look()[0] == before + 100 - 10  # the reserve is a tenth
    machine.limit(None, current=400)
    assert machine.look() == WHOLE_HOST
    machine.look()
    assert machine.logged == ["budget-limited", "budget-unlimited"]


@pytest.mark.parametrize("text", [None, "", "lots"])
def test_the_last_budget_stays_while_the_cgroup_cannot_be_read(text: str | None, machine: _Machine) -> None:
    before = machine.look()
    if text is None:
        (machine.group / "memory.max").unlink()
    else:
        (machine.group / "memory.max").write_text(text)
    assert [machine.look(), machine.look()] == [before, before]
    machine.limit(560, current=400)
    assert machine.look() == before
    assert machine.logged == ["budget-limited", "budget-unknown", "budget-limited"]


def test_the_stall_is_that_of_the_cgroup(machine: _Machine) -> None:
    machine.look()
    assert machine.monitor.sample.psi_full_avg10 == 1.0  # version 1 has none per group
    (machine.group / "memory.pressure").write_text("some avg10=40.00\nfull avg10=30.00\n")
    machine.look()
    assert machine.monitor.sample.psi_full_avg10 == 30.0


def test_the_level_depends_on_the_memory_left_in_the_cgroup(machine: _Machine) -> None:
    machine.limit(560, current=570)
    machine.look()
    sample = machine.monitor.sample
    machine.monitor.judge(
        a_host(budget=8192, mem_available=sample.mem_available, reserve=machine.monitor.reserve), lent=0
    )
    assert "level" in machine.logged
    assert sample.mem_available == 10 * MIB


def test_the_own_limit_counts_where_no_cgroup_is_configured(machine: _Machine) -> None:
    others = 400 - 20 - 2 * (150 - 32)
    assert machine.look("80%") == (560 - others - 56, 56, 180)
    assert machine.look("50%")[0] == 280
    assert machine.look("4GiB")[0] == 560 - others - 56
    machine.limit(None, current=400)
    assert machine.look("80%") == WHOLE_HOST


def test_the_own_limit_counts_where_the_configured_cgroup_has_none(machine: _Machine) -> None:
    (machine.cgroups / "outside").mkdir()
    (machine.cgroups / "outside/memory.max").write_text("max")
    machine.monitor.look(HostSettings(budget=CgroupBudget("/outside")), lambda: QEMUS)
    assert machine.monitor.budget == (560 - (400 - 20 - 2 * (150 - 32)) - 56) * MIB
    assert machine.logged == ["budget-unlimited"]


def test_a_limit_of_the_agent_alone_does_not_count(machine: _Machine) -> None:
    machine.move("71", "/elsewhere")
    assert machine.look("80%") == WHOLE_HOST
    machine.monitor.look(HostSettings())  # no QEMU is known
    assert machine.monitor.budget == parse_amount("80%").of(8192 * MIB)
    assert machine.logged == []


def test_the_reserve_of_the_host_is_kept_beside_that_of_the_cgroup(machine: _Machine) -> None:
    (machine.proc / "meminfo").write_text(f"MemTotal: {8192 * 1024} kB\nMemAvailable: {500 * 1024} kB\n")
    assert machine.look()[1:] == (56, 500 - 512 + 56)


def test_a_total_that_is_that_of_the_container_already_is_not_lowered_twice(machine: _Machine) -> None:
    (machine.proc / "meminfo").write_text(f"MemTotal: {560 * 1024} kB\nMemAvailable: {170 * 1024} kB\n")
    assert machine.look("50%") == (280, 56, 170)
    assert machine.monitor.sample.mem_total == 560 * MIB


def test_another_budget_ends_the_limit_of_a_cgroup(machine: _Machine) -> None:
    machine.look()
    for process in QEMUS:
        machine.move(str(process), "/elsewhere")
    (machine.group / "memory.max").unlink()
    assert machine.look("80%") == WHOLE_HOST
