"""The findings about the host. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qmpballoon.doctor.facts import ExaminedHost, Swap
from qmpballoon.doctor.findings import Finding, Rule, found
from qmpballoon.units import MIB, format_size

_MUCH: Final = 0.1  # of the host's memory
_LITTLE: Final = 64 * MIB
_JUMP_S: Final = 1.5  # more than a leap second
_DESCRIPTORS_PER_VM: Final = 3  # a monitor, a file of /proc, and one that is replaced meanwhile
_DESCRIPTORS_BESIDE: Final = 96  # the broker, 64 control clients, files of /proc and /sys


def _floors(host: ExaminedHost) -> str | None:
    agent = host.agent
    if agent is None or agent.budget is None or agent.floors <= agent.budget:
        return None
    floors, budget = format_size(agent.floors), format_size(agent.budget)
    return f"the floors of all VMs together are {floors}, the budget is {budget}"


def _others(host: ExaminedHost) -> str | None:
    if host.agent is None or not host.agent.others:
        return None
    return f"other agents listen at {', '.join(host.agent.others)}"


def _descriptors(host: ExaminedHost) -> str | None:
    agent = host.agent
    if agent is None:
        return None
    needed = agent.vms * _DESCRIPTORS_PER_VM + _DESCRIPTORS_BESIDE
    if agent.descriptors_limit >= needed:
        return None
    return f"the agent may open {agent.descriptors_limit} files; {agent.vms} VMs may need {needed}"


def _unidentified(host: ExaminedHost) -> str | None:
    agent = host.agent
    if agent is None or not agent.unidentified:
        return None
    path, reason = agent.unidentified[0]
    reason = reason.removeprefix(f"{path}: ")
    more = f"; and {len(agent.unidentified) - 1} more" if len(agent.unidentified) > 1 else ""
    return f"{path}: {reason}{more}"


def _is_large(size: int, host: ExaminedHost) -> bool:
    """Tell whether something that is not available takes much memory, or some while the reserve is used."""
    if host.mem_total is None:
        return False
    reserve = host.agent.reserve if host.agent else 0
    is_short = host.mem_available is not None and host.mem_available < reserve
    return size > host.mem_total * _MUCH or (is_short and size > _LITTLE)


def _of_memory(size: int, host: ExaminedHost) -> str:
    available = f", {format_size(host.mem_available)} are available" if host.mem_available is not None else ""
    reserve = f", the reserve is {format_size(host.agent.reserve)}" if host.agent else ""
    return f"{format_size(size)} of the host's {format_size(host.mem_total)}{available}{reserve}"


def _arc(host: ExaminedHost) -> str | None:
    if host.arc is None or not _is_large(host.arc, host):
        return None
    return f"the ARC of ZFS has {_of_memory(host.arc, host)}"


def _tmpfs(host: ExaminedHost) -> str | None:
    if host.tmpfs is None or not _is_large(host.tmpfs, host):
        return None
    return f"tmpfs and shared memory, guests apart, have {_of_memory(host.tmpfs, host)}"


def _psi(host: ExaminedHost) -> str | None:
    return "/proc/pressure/memory is not there" if not host.has_psi else None


def _swap(host: ExaminedHost) -> str | None:
    return _listed([swap for swap in host.swaps if not swap.is_zram])


def _zram(host: ExaminedHost) -> str | None:
    return _listed([swap for swap in host.swaps if swap.is_zram])


def _listed(swaps: Sequence[Swap]) -> str | None:
    parts = [f"{swap.name}: {format_size(swap.used)} of {format_size(swap.size)} used" for swap in swaps]
    return ", ".join(parts) or None


def _ksm(host: ExaminedHost) -> str | None:
    return None if host.merged is None else f"KSM runs, and saves {format_size(host.merged)}"


def _vms_size(host: ExaminedHost) -> str | None:
    if host.mem_total is None or host.vms_size <= host.mem_total:
        return None
    return f"all VMs together have {format_size(host.vms_size)}, the host {format_size(host.mem_total)}"


def _clock_set(host: ExaminedHost) -> str | None:
    agent = host.agent
    if agent is None or abs(agent.clock_set_by_s) < _JUMP_S:
        return None
    return f"the clock was set by {agent.clock_set_by_s:+.0f} s since the agent's start"


def _clock(host: ExaminedHost) -> str | None:
    return "the kernel's clock is not synchronised" if host.clock_is_synchronised is False else None


HOST_RULES: Final[tuple[Rule[ExaminedHost], ...]] = (
    Rule(
        "floors-over-budget",
        "error",
        "No policy can keep to this budget: the guests may take more than the host can give.",
        'lower floors, `[vm] floor = "25%"`; a larger `[host] budget`; or fewer VMs',
        _floors,
    ),
    Rule(
        "several-agents",
        "warning",
        "Each agent counts only its own VMs against its budget.",
        "one agent for all sockets; or budgets that add up: `[host] budget`",
        _others,
    ),
    Rule(
        "few-descriptors",
        "warning",
        "Without a free descriptor the agent can connect to no more VMs and save nothing.",
        "`LimitNOFILE=65536` in the agent's unit (`systemctl edit qmpballoon`), or `ulimit -n 65536`",
        _descriptors,
    ),
    Rule(
        "socket-unidentified",
        "warning",
        "The agent watches this socket and knows no VM behind it.",
        "start the VM; give it a monitor of its own; let the agent read the directory; or leave the "
        "socket out of `[discovery] sockets`",
        _unidentified,
    ),
    Rule(
        "arc-large",
        "warning",
        "The kernel does not count it as available. ZFS gives it back slowly, often too late for a guest.",
        "`options zfs zfs_arc_max=BYTES` in `/etc/modprobe.d/zfs.conf`",
        _arc,
    ),
    Rule(
        "tmpfs-large",
        "warning",
        "It is not available and cannot be dropped as page cache can, only swapped.",
        "find it: `df -t tmpfs` and `ipcs -m`; limit a mount: `mount -o remount,size=256M /tmp`",
        _tmpfs,
    ),
    Rule(
        "psi-off",
        "warning",
        "The host's stall is not known: the level hard is told late, by available memory alone.",
        "`psi=1` on the kernel's command line",
        _psi,
    ),
    Rule(
        "host-swap",
        "note",
        "The host may swap guests out, which is slower than a balloon and not seen in RSS.",
        "`MemorySwapMax=0` for the VMs' units or slice, or `swapoff -a`",
        _swap,
    ),
    Rule(
        "host-zram",
        "note",
        "zram keeps what is swapped in memory, compressed: to swap guests out frees less than it seems.",
        "`MemorySwapMax=0` for the VMs' units or slice, or `swapoff /dev/zram0`",
        _zram,
    ),
    Rule(
        "ksm-on",
        "note",
        "Merged pages are counted in each RSS. A guest that writes to one takes host memory unannounced.",
        "`echo 2 > /sys/kernel/mm/ksm/run`, or for a VM: `-machine mem-merge=off`",
        _ksm,
    ),
    Rule(
        "overcommitted",
        "note",
        "This works only as long as balloons hold the rest: a VM without one may take all of its size.",
        "a `[host] budget` below the host's memory, and a balloon in each VM",
        _vms_size,
    ),
    Rule(
        "clock-jumped",
        "note",
        "Stamps from before and after cannot be compared. Nothing is decided by them.",
        "steps at the start alone: `makestep 1 3` in `/etc/chrony/chrony.conf`",
        _clock_set,
    ),
    Rule(
        "clock-unsynchronised",
        "note",
        "Stamps of state and events may be wrong. Nothing is decided by them.",
        "`timedatectl set-ntp true`, or `chronyd`",
        _clock,
    ),
)


def host_findings(host: ExaminedHost) -> list[Finding]:
    """Return what is wrong with the host, or should be known about it, worst first."""
    return found(HOST_RULES, host, {})


def host_not_told(host: ExaminedHost) -> list[str]:
    """Return what could not be found out about the host, a sentence each."""
    sentences = [] if host.agent else ["no agent runs: budget, reserve and floors are not known"]
    if host.clock_is_synchronised is None:
        sentences.append("the kernel does not tell whether its clock is synchronised")
    return sentences
