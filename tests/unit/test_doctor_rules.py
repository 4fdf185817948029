"""Each finding: the facts that cause it and no other, and facts next to them that do not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qmpballoon.doctor.facts import (
    AgentFigures,
    Backend,
    Balloon,
    ExaminedHost,
    ExaminedVm,
    Feature,
    Process,
    Swap,
)
from qmpballoon.doctor.findings import SEVERITIES, Finding, Rule, found
from qmpballoon.doctor.host_rules import HOST_RULES, host_findings, host_not_told
from qmpballoon.doctor.vm_rules import VM_RULES, abilities, not_told, vm_findings
from qmpballoon.units import GIB, MIB

BALLOON = Balloon(
    kind="virtio-balloon-ccw",
    path="/machine/peripheral/b",
    driver=True,
    deflate_on_oom=Feature(True, True),
    free_page_reporting=Feature(True, True),
    has_statistics_queue=True,
    has_reported=True,
    has_figures=True,
    is_fresh=True,
    swapped_out=0,
)
VM = ExaminedVm(
    name="web",
    socket="/run/web.qmp",
    pid=47,
    qemu="7.2.22",
    run_state="running",
    age_s=100.0,
    size=256 * MIB,
    balloon=BALLOON,
    backends=(Backend("pc.ram", 256 * MIB, shared=False),),
    locked=0,
    swapped=0,
    host_memory=2 * GIB,
)
"""Nothing is wrong with it."""

AGENT = AgentFigures(budget=GIB, reserve=256 * MIB, floors=GIB, vms=4, descriptors_limit=1024)
HOST = ExaminedHost(
    mem_total=2 * GIB,
    mem_available=GIB,
    tmpfs=100 * MIB,
    arc=100 * MIB,
    clock_is_synchronised=True,
    vms_size=2 * GIB,
    agent=AGENT,
)
"""Nothing is wrong with it."""


def vm_with(**balloon: object) -> ExaminedVm:
    return replace(VM, balloon=replace(BALLOON, **balloon))  # type: ignore[arg-type]


def of_memory(**backend: object) -> ExaminedVm:
    return replace(VM, backends=(replace(VM.backends[0], **backend),))  # type: ignore[arg-type]


def host_with(**agent: object) -> ExaminedHost:
    return replace(HOST, agent=replace(AGENT, **agent))  # type: ignore[arg-type]


UNASKED = {"driver": None, "deflate_on_oom": Feature(True), "free_page_reporting": Feature(True)}
SILENT = {"has_reported": False, "has_figures": False, "is_fresh": False, "swapped_out": None}

VM_EXAMPLES: list[tuple[str, ExaminedVm, str]] = [
    ("not-reached", ExaminedVm("web", "/run/web.qmp", "not-reached", "/run/web.qmp: gone"), "gone"),
    ("qemu-stopped", ExaminedVm("web", "/run/web.qmp", "stopped", pid=47), "pid 47"),
    ("monitor-busy", ExaminedVm("web", "/w", "busy", holders=(Process(9, "socat"),)), "socat (pid 9)"),
    ("monitor-busy", ExaminedVm("web", "/w", "busy"), "does not tell which"),
    ("human-monitor", ExaminedVm("web", "/w", "human"), "/w is QEMU's human monitor"),
    ("no-balloon", replace(VM, balloon=None), "no balloon device"),
    ("no-driver", vm_with(driver=False), "100 s after QEMU's start"),
    ("no-driver", vm_with(**UNASKED, **SILENT), "QEMU 7.2.22 is not asked"),
    ("vfio", replace(VM, passed_through=("gpu (vfio-pci)",)), "gpu (vfio-pci)"),
    ("locked-memory", replace(VM, locked=300 * MIB), "300 MiB of QEMU's memory are locked"),
    ("huge-pages", of_memory(huge=True), "memory pc.ram (256 MiB) has huge pages"),
    ("larger-than-host", replace(VM, size=3 * GIB), "the VM has 3 GiB, the host 2 GiB"),
    ("no-service", vm_with(has_figures=False), "every figure"),
    ("no-statistics", vm_with(is_fresh=False), "none come any more"),
    ("no-statistics", vm_with(**SILENT), "have come since QEMU's start"),
    ("no-statistics", vm_with(**SILENT, has_statistics_queue=False), "did not take the statistics queue"),
    ("deflate-on-oom-off", vm_with(deflate_on_oom=Feature(False), swapped_out=1), "does not offer"),
    ("deflate-on-oom-refused", vm_with(deflate_on_oom=Feature(True, False), swapped_out=1), "did not take"),
    ("private-file", of_memory(is_on_tmpfs=True), "memory pc.ram (256 MiB) is a private copy"),
    ("qemu-swapped", replace(VM, swapped=9 * MIB), "swapped out 9 MiB of QEMU"),
    ("free-page-reporting-off", vm_with(free_page_reporting=Feature(False)), "does not offer"),
    ("free-page-reporting-refused", vm_with(free_page_reporting=Feature(True, False)), "did not take"),
    ("preallocated", of_memory(preallocated=True), "memory pc.ram (256 MiB) is allocated at the start"),
    ("shared-memory", of_memory(shared=True), "memory pc.ram (256 MiB) is shared"),
    ("paused", replace(VM, run_state="prelaunch"), "the VM is prelaunch"),
    ("pretty-monitor", replace(VM, is_pretty=True), "/run/web.qmp spreads"),
    ("process-unseen", replace(VM, pid=None), "not visible here"),
]
HOST_EXAMPLES: list[tuple[str, ExaminedHost, str]] = [
    ("floors-over-budget", host_with(floors=GIB + 1), "the floors of all VMs together are 1 GiB"),
    ("several-agents", host_with(others=("/run/b/agent.sock",)), "/run/b/agent.sock"),
    ("few-descriptors", host_with(descriptors_limit=100), "may open 100 files; 4 VMs may need 108"),
    ("socket-unidentified", host_with(unidentified=(("/a.qmp", "/a.qmp: no"), ("/b", "no"))), "and 1 more"),
    ("arc-large", replace(HOST, arc=300 * MIB), "the ARC of ZFS has 300 MiB of the host's 2 GiB"),
    ("tmpfs-large", replace(HOST, tmpfs=300 * MIB), "1 GiB are available, the reserve is 256 MiB"),
    ("psi-off", replace(HOST, has_psi=False), "/proc/pressure/memory"),
    ("host-swap", replace(HOST, swaps=(Swap("/dev/sda2", GIB, MIB),)), "/dev/sda2: 1 MiB of 1 GiB used"),
    ("host-zram", replace(HOST, swaps=(Swap("/dev/zram0", GIB, 0),)), "/dev/zram0: 0 B of 1 GiB used"),
    ("ksm-on", replace(HOST, merged=5 * MIB), "saves 5 MiB"),
    ("overcommitted", replace(HOST, vms_size=3 * GIB), "all VMs together have 3 GiB"),
    ("clock-jumped", host_with(clock_set_by_s=-3600.2), "the clock was set by -3600 s"),
    ("clock-unsynchronised", replace(HOST, clock_is_synchronised=False), "not synchronised"),
]
SWAP_UNSEEN = "guest-swap-unseen"  # comes with deflate-on-oom-off or -refused


@pytest.mark.parametrize(("word", "vm", "seen"), VM_EXAMPLES)
def test_a_vm_with_one_trouble_has_one_finding(word: str, vm: ExaminedVm, seen: str) -> None:
    (finding,) = vm_findings(vm)
    assert finding.word == word
    assert seen in finding.seen


@pytest.mark.parametrize(("word", "host", "seen"), HOST_EXAMPLES)
def test_a_host_with_one_trouble_has_one_finding(word: str, host: ExaminedHost, seen: str) -> None:
    (finding,) = host_findings(host)
    assert finding.word == word
    assert seen in finding.seen


def test_every_word_has_an_example() -> None:
    vm_words = [*dict.fromkeys(word for word, *_ in VM_EXAMPLES), SWAP_UNSEEN]
    assert sorted(rule.word for rule in VM_RULES) == sorted(vm_words)
    assert [rule.word for rule in HOST_RULES] == [word for word, *_ in HOST_EXAMPLES]


def test_a_good_vm_and_a_good_host_have_none() -> None:
    assert vm_findings(VM) == []
    assert host_findings(HOST) == []
    assert not_told(VM) == []
    assert host_not_told(HOST) == []


@pytest.mark.parametrize(
    "vm",
    [
        vm_with(**UNASKED),
        vm_with(driver=None, has_reported=True),
        vm_with(free_page_reporting=Feature(None)),  # QEMU before 5.1
        replace(VM, locked=127 * MIB),
        replace(VM, locked=None, swapped=None),
        replace(VM, swapped=8 * MIB - 1),
        replace(VM, size=2 * GIB),
        of_memory(shared=None, huge=None),
        of_memory(shared=None, is_on_tmpfs=True),
    ],
)
def test_facts_that_are_good_or_not_known_make_no_finding(vm: ExaminedVm) -> None:
    assert vm_findings(vm) == []


@pytest.mark.parametrize("run_state", ["paused", "prelaunch", "inmigrate"])
def test_driver_and_statistics_of_a_guest_that_does_not_run_are_not_judged(run_state: str) -> None:
    vm = replace(vm_with(driver=False, **SILENT), run_state=run_state)
    assert [finding.word for finding in vm_findings(vm)] == ["paused"]
    assert (abilities(vm)["driver"], abilities(vm)["statistics"]) == (None, None)


@pytest.mark.parametrize(("swapped_out", "words"), [(0, 1), (None, 1), (4096, 0)])
def test_swap_in_the_guest_is_doubted_only_where_nothing_was_swapped(
    swapped_out: int | None, words: int
) -> None:
    vm = vm_with(deflate_on_oom=Feature(False), swapped_out=swapped_out)
    assert [finding.word for finding in vm_findings(vm)].count(SWAP_UNSEEN) == words


def test_memory_in_use_matters_earlier_while_the_reserve_is_used() -> None:
    short = replace(HOST, mem_available=200 * MIB)
    assert [finding.word for finding in host_findings(short)] == ["arc-large", "tmpfs-large"]
    assert host_findings(replace(short, arc=50 * MIB, tmpfs=50 * MIB)) == []


def test_a_leap_second_is_no_jump() -> None:
    assert host_findings(host_with(clock_set_by_s=1.0)) == []
    assert host_findings(host_with(clock_set_by_s=-1.0)) == []


def test_without_an_agent_only_the_kernel_is_judged() -> None:
    host = replace(HOST, agent=None)
    assert host_findings(host) == []
    assert "no agent runs" in host_not_told(host)[0]


def test_the_worst_come_first() -> None:
    vm = replace(vm_with(driver=False, deflate_on_oom=Feature(False)), is_pretty=True)
    severities = [finding.severity for finding in vm_findings(vm)]
    assert severities == sorted(severities, key=SEVERITIES.index)
    assert severities[0] == "error"
    assert severities[-1] == "note"


def test_what_mends_it_has_the_device_and_the_pid_of_this_vm() -> None:
    (finding,) = vm_findings(vm_with(free_page_reporting=Feature(False)))
    assert finding.mend == "`-device virtio-balloon-ccw,free-page-reporting=on`"
    (stopped,) = vm_findings(ExaminedVm("web", "/w", "stopped", pid=47))
    assert stopped.mend == "`kill -CONT 47`"
    (paused,) = vm_findings(replace(VM, run_state="paused"))
    assert paused.mend.endswith('`{"execute": "cont"}`')


def test_text_of_a_vm_controls_no_terminal() -> None:
    (finding,) = vm_findings(replace(VM, passed_through=("\x1b[2Jgpu\n",)))
    assert finding.seen == "devices: ?[2Jgpu?"
    braces = replace(VM, balloon=replace(BALLOON, kind="{pid}", free_page_reporting=Feature(False)))
    assert vm_findings(braces)[0].mend == "`-device {pid},free-page-reporting=on`"


def test_what_qemu_does_not_tell_is_said() -> None:
    assert "QEMU 7.2.22 is not asked" in not_told(vm_with(**UNASKED))[0]
    assert "free-page-reporting" in not_told(vm_with(free_page_reporting=Feature(None)))[0]
    assert "shared" in not_told(of_memory(shared=None))[0]
    assert not_told(ExaminedVm("web", "/w", "busy")) == []


def test_abilities_of_a_good_balloon_and_of_one_that_frees_nothing() -> None:
    assert abilities(VM) == {
        "balloon": True,
        "driver": True,
        "statistics": True,
        "deflate_on_oom": "on",
        "free_page_reporting": "on",
        "frees": True,
    }
    assert abilities(of_memory(huge=True))["frees"] is False
    assert abilities(replace(VM, locked=VM.size))["frees"] is False
    assert set(abilities(ExaminedVm("web", "/w", "busy")).values()) == {None}


@pytest.mark.parametrize(
    ("feature", "word"),
    [
        (Feature(), None),
        (Feature(False, False), "not-offered"),
        (Feature(True), "offered"),
        (Feature(True, True), "on"),
        (Feature(True, False), "refused"),
    ],
)
def test_a_feature_has_a_word(feature: Feature, word: str | None) -> None:
    assert feature.word == word


def test_a_rule_that_sees_nothing_makes_no_finding() -> None:
    rules: list[Rule[int]] = [
        Rule("a", "note", "A.", "{x}", lambda fact: None),
        Rule("b", "error", "B.", "`{x}`", lambda fact: f"seen {fact}"),
    ]
    assert found(rules, 3, {"x": "y"}) == [Finding("b", "error", "seen 3", "B.", "`y`")]


@pytest.mark.parametrize("rule", [*VM_RULES, *HOST_RULES], ids=lambda rule: rule.word)
def test_a_rule_says_what_to_type_within_80_columns(rule: Rule[Any]) -> None:
    places = {"pid": 4194304, "device": "virtio-balloon-pci-non-transitional"}
    commands = re.findall("`([^`]*)`", rule.mend.format_map(places))
    assert max(map(len, commands), default=0) <= 70
    assert rule.mend.count("`") % 2 == 0
    assert rule.means.endswith(".")
    assert len(rule.means) > 20


# ---- the page that explains them ----

PAGE = (Path(__file__).parent.parent.parent / "docs" / "doctor.md").read_text(encoding="utf-8")
PLACES = {"pid": "PID", "device": "DEVICE"}


def row_of(rule: Rule[Any]) -> str:
    return f"| `{rule.word}` | {rule.severity} | {rule.means} | {rule.mend.format_map(PLACES)} |"


def test_the_page_has_each_word_as_the_program_has_it_and_no_other() -> None:
    rows = [row_of(rule) for rule in VM_RULES] + [row_of(rule) for rule in HOST_RULES]
    assert re.findall(r"^\| `.*$", PAGE, flags=re.MULTILINE) == rows
