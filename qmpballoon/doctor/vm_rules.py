"""The findings about one VM. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qmpballoon.addresses import is_tcp
from qmpballoon.doctor.facts import Backend, Balloon, ExaminedVm
from qmpballoon.doctor.findings import Finding, Rule, found
from qmpballoon.units import MIB, format_size

_MONITOR: Final = "`-qmp unix:/run/qmpballoon/NAME.qmp,server=on,wait=off`"
_LITTLE: Final = 8 * MIB
_ABILITIES: Final = ("balloon", "driver", "statistics", "deflate_on_oom", "free_page_reporting", "frees")


def _running(vm: ExaminedVm) -> Balloon | None:
    """Return the balloon of a VM whose guest runs, so that its driver and statistics can be judged."""
    return vm.balloon if vm.run_state == "running" else None


def _is_up(balloon: Balloon) -> bool:
    """Tell whether a driver is up: by QEMU's word, or where it does not tell by statistics."""
    return balloon.driver if balloon.driver is not None else balloon.has_reported or balloon.is_fresh


def _lacks_service(balloon: Balloon) -> bool:
    return _is_up(balloon) and balloon.has_reported and not balloon.has_figures


def _not_reached(vm: ExaminedVm) -> str | None:
    return vm.problem if vm.reached == "not-reached" else None


def _stopped(vm: ExaminedVm) -> str | None:
    return f"QEMU (pid {vm.pid}) is stopped by a signal or a debugger" if vm.reached == "stopped" else None


def _busy(vm: ExaminedVm) -> str | None:
    if vm.reached != "busy":
        return None
    who = ", ".join(map(str, vm.holders)) or "another client; the kernel does not tell which"
    return f"{vm.socket} is held by {who}"


def _human(vm: ExaminedVm) -> str | None:
    return f"{vm.socket} is QEMU's human monitor" if vm.reached == "human" else None


def _no_balloon(vm: ExaminedVm) -> str | None:
    return "QEMU has no balloon device" if vm.reached == "up" and vm.balloon is None else None


def _no_driver(vm: ExaminedVm) -> str | None:
    balloon = _running(vm)
    if balloon is None or _is_up(balloon):
        return None
    since = "" if vm.age_s is None else f" {vm.age_s:.0f} s after QEMU's start"
    if balloon.driver is None:
        return f"QEMU {vm.qemu} is not asked for the driver, and no statistics have come{since}"
    return f"no driver is up in the guest{since}"


def _no_service(vm: ExaminedVm) -> str | None:
    balloon = _running(vm)
    if balloon is None or not _lacks_service(balloon):
        return None
    return "the driver answers, and every figure in its answers is missing"


def _no_statistics(vm: ExaminedVm) -> str | None:
    balloon = _running(vm)
    if balloon is None or balloon.is_fresh or not _is_up(balloon) or _lacks_service(balloon):
        return None
    if balloon.has_statistics_queue is False:
        return "the driver is up and did not take the statistics queue"
    return (
        "statistics came, and none come any more"
        if balloon.has_reported
        else "the driver is up, and no statistics have come since QEMU's start"
    )


def _vfio(vm: ExaminedVm) -> str | None:
    return f"devices: {', '.join(vm.passed_through)}" if vm.passed_through else None


def _locked(vm: ExaminedVm) -> str | None:
    if not vm.locked or vm.size is None or vm.locked < vm.size // 2:
        return None
    return f"{format_size(vm.locked)} of QEMU's memory are locked; the guest has {format_size(vm.size)}"


def _huge(vm: ExaminedVm) -> str | None:
    return _listed((backend for backend in vm.backends if backend.huge), "has huge pages")


def _preallocated(vm: ExaminedVm) -> str | None:
    return _listed((backend for backend in vm.backends if backend.preallocated), "is allocated at the start")


def _shared(vm: ExaminedVm) -> str | None:
    return _listed((backend for backend in vm.backends if backend.shared), "is shared (share=on)")


def _copied(vm: ExaminedVm) -> str | None:
    return _listed(
        (backend for backend in vm.backends if backend.is_copied), "is a private copy of a file in tmpfs"
    )


def _listed(backends: Iterable[Backend], what: str) -> str | None:
    """Return which parts of the memory are so, with their sizes; None without any."""
    names = ", ".join(f"{backend.id} ({format_size(backend.size)})" for backend in backends)
    return f"memory {names} {what}" if names else None


def _swapped(vm: ExaminedVm) -> str | None:
    if vm.swapped is None or vm.swapped < _LITTLE:
        return None
    return f"the host has swapped out {format_size(vm.swapped)} of QEMU"


def _too_large(vm: ExaminedVm) -> str | None:
    if vm.size is None or vm.host_memory is None or vm.size <= vm.host_memory:
        return None
    return f"the VM has {format_size(vm.size)}, the host {format_size(vm.host_memory)}"


def _deflate_off(vm: ExaminedVm) -> str | None:
    is_off = vm.balloon is not None and vm.balloon.deflate_on_oom.word == "not-offered"
    return "QEMU does not offer deflate-on-oom" if is_off else None


def _deflate_refused(vm: ExaminedVm) -> str | None:
    is_refused = vm.balloon is not None and vm.balloon.deflate_on_oom.word == "refused"
    return "QEMU offers deflate-on-oom, and the guest's driver did not take it" if is_refused else None


def _reporting_off(vm: ExaminedVm) -> str | None:
    is_off = vm.balloon is not None and vm.balloon.free_page_reporting.word == "not-offered"
    return "QEMU does not offer free-page-reporting" if is_off else None


def _reporting_refused(vm: ExaminedVm) -> str | None:
    is_refused = vm.balloon is not None and vm.balloon.free_page_reporting.word == "refused"
    return "QEMU offers free-page-reporting, and the guest's driver did not take it" if is_refused else None


def _swap_unseen(vm: ExaminedVm) -> str | None:
    balloon = _running(vm)
    if balloon is None or not balloon.has_figures or balloon.swapped_out:
        return None
    if balloon.deflate_on_oom.word not in ("not-offered", "refused"):
        return None
    return "the guest has swapped out nothing since its boot; whether it has swap is not told"


def _paused(vm: ExaminedVm) -> str | None:
    return f"the VM is {vm.run_state}" if vm.run_state not in (None, "running") else None


def _pretty(vm: ExaminedVm) -> str | None:
    return f"{vm.socket} spreads each message over many lines" if vm.is_pretty else None


def _process_unseen(vm: ExaminedVm) -> str | None:
    is_unseen = vm.reached == "up" and vm.pid is None
    if is_unseen and is_tcp(vm.socket):
        return "the monitor is one over TCP, which tells nothing of its process"
    return "the process behind the monitor is not QEMU, or not visible here" if is_unseen else None


VM_RULES: Final[tuple[Rule[ExaminedVm], ...]] = (
    Rule(
        "not-reached",
        "error",
        "Nothing is known of this VM, and its balloon cannot be moved.",
        f"start the VM, or give QEMU a monitor: {_MONITOR}",
        _not_reached,
    ),
    Rule(
        "qemu-stopped",
        "error",
        "A stopped QEMU answers nothing, and its guest does not run.",
        "`kill -CONT {pid}`",
        _stopped,
    ),
    Rule(
        "monitor-busy",
        "error",
        "A monitor serves one client at a time; the next one waits without an answer.",
        f"give QEMU one more monitor, for this program alone: {_MONITOR}",
        _busy,
    ),
    Rule(
        "human-monitor",
        "error",
        "A human monitor (-monitor, mode=readline) does not speak QMP.",
        f"give QEMU one more monitor: {_MONITOR}",
        _human,
    ),
    Rule(
        "no-balloon",
        "error",
        "Without the device the guest's memory cannot be changed, and no statistics come.",
        "`-device virtio-balloon-pci,deflate-on-oom=on,free-page-reporting=on`",
        _no_balloon,
    ),
    Rule(
        "no-driver",
        "error",
        "Targets are accepted and nothing moves. A guest that still boots has no driver yet.",
        "in the guest: `modprobe virtio_balloon` (Windows: the Balloon driver of virtio-win)",
        _no_driver,
    ),
    Rule(
        "vfio",
        "error",
        "The device reaches all of the guest's memory: the balloon moves, and QEMU frees none of it.",
        'remove them from QEMU\'s command line; or leave this VM alone: `mode = "manual"`',
        _vfio,
    ),
    Rule(
        "locked-memory",
        "error",
        "Locked pages cannot be freed: the balloon moves, and the host gets nothing back.",
        "`-overcommit mem-lock=off` (libvirt: no `<locked/>` in `<memoryBacking>`)",
        _locked,
    ),
    Rule(
        "huge-pages",
        "error",
        "The balloon takes pages of 4 KiB. QEMU frees a huge page only when all of it is taken, mostly none, "
        "and that goes back to the pool of huge pages.",
        "memory of normal pages: no `hugetlb=on`, and no `-mem-path` on a hugetlbfs",
        _huge,
    ),
    Rule(
        "larger-than-host",
        "error",
        "The guest can use more memory than the host has: without swap the host kills a process then.",
        'a smaller `-m`; or a ceiling below the host\'s memory: `ceiling = "50%"`',
        _too_large,
    ),
    Rule(
        "no-service",
        "warning",
        "The balloon moves, but what the guest needs is not known. On Windows the figures come from a "
        "service of its own, which is not installed with the driver.",
        "in the guest, as administrator: `blnsvr.exe -i` (beside the Balloon driver of virtio-win)",
        _no_service,
    ),
    Rule(
        "no-statistics",
        "warning",
        "What the guest needs is not known: a policy holds such a VM as it is.",
        "in the guest, load the driver again: `modprobe -r virtio_balloon; modprobe virtio_balloon`",
        _no_statistics,
    ),
    Rule(
        "deflate-on-oom-off",
        "warning",
        "A guest that runs out of memory kills a process, even while its balloon holds memory.",
        "`-device {device},deflate-on-oom=on`",
        _deflate_off,
    ),
    Rule(
        "deflate-on-oom-refused",
        "warning",
        "A guest that runs out of memory kills a process, even while its balloon holds memory.",
        "a guest with Linux 3.19 or later; Windows and BSD drivers do not have this feature",
        _deflate_refused,
    ),
    Rule(
        "private-file",
        "warning",
        "The host holds each page twice: in the file, which RSS does not count, and as QEMU's own copy.",
        "`share=on`, or no `-mem-path` and `memory-backend-ram`",
        _copied,
    ),
    Rule(
        "qemu-swapped",
        "warning",
        "Memory that the guest takes for present has to be read from swap, and RSS tells less than it holds.",
        "in the VM's unit: `MemorySwapMax=0` (its cgroup's `memory.swap.max`); or `swapoff -a`",
        _swapped,
    ),
    Rule(
        "free-page-reporting-off",
        "note",
        "What the guest frees stays in QEMU until the balloon takes it.",
        "`-device {device},free-page-reporting=on`",
        _reporting_off,
    ),
    Rule(
        "free-page-reporting-refused",
        "note",
        "What the guest frees stays in QEMU until the balloon takes it.",
        "a guest with Linux 5.7 or later and CONFIG_PAGE_REPORTING",
        _reporting_refused,
    ),
    Rule(
        "preallocated",
        "note",
        "QEMU takes all of this memory at its start; the host gets some back only when the balloon moves.",
        "`prealloc=off`, and no `-mem-prealloc`",
        _preallocated,
    ),
    Rule(
        "shared-memory",
        "note",
        "The host counts it as shared memory (tmpfs), KSM does not merge it, and other processes "
        "(vhost-user) may keep it.",
        "`share=off`, unless a vhost-user device needs it",
        _shared,
    ),
    Rule(
        "guest-swap-unseen",
        "note",
        "Without swap and without deflate-on-oom a guest kills a process the moment its memory is used up.",
        "in the guest: `swapon --show` tells; or `-device {device},deflate-on-oom=on`",
        _swap_unseen,
    ),
    Rule(
        "paused",
        "note",
        "A guest that does not run moves no balloon and sends no statistics: neither could be judged.",
        'continue it, over QMP: `{{"execute": "cont"}}`',
        _paused,
    ),
    Rule(
        "pretty-monitor",
        "note",
        "It works, and costs both sides more bytes and time.",
        f"no `pretty=on`, and no `-qmp-pretty`: {_MONITOR}",
        _pretty,
    ),
    Rule(
        "process-unseen",
        "note",
        "RSS, locked and swapped memory are not known, and a restarted QEMU is told by less.",
        "QEMU's own socket instead of a proxy's, and the agent in QEMU's pid namespace",
        _process_unseen,
    ),
)


def vm_findings(vm: ExaminedVm) -> list[Finding]:
    """Return what is wrong with a VM, or should be known about it, worst first."""
    device = vm.balloon.kind if vm.balloon else "virtio-balloon-pci"
    return found(VM_RULES, vm, {"pid": vm.pid, "device": device})


def abilities(vm: ExaminedVm) -> dict[str, object]:
    """Return what the VM's balloon can do, as JSON values; null is not known.

    ``driver`` and ``statistics`` are true or false; the two features are words of `Feature`. ``frees``: what
    the balloon takes goes back to the host.
    """
    balloon = vm.balloon
    if vm.reached != "up":
        return dict.fromkeys(_ABILITIES)
    is_judged = balloon is not None and vm.run_state == "running"
    return {
        "balloon": balloon is not None,
        "driver": _is_up(balloon) if balloon and is_judged else None,
        "statistics": balloon.is_fresh and balloon.has_figures if balloon and is_judged else None,
        "deflate_on_oom": balloon.deflate_on_oom.word if balloon else None,
        "free_page_reporting": balloon.free_page_reporting.word if balloon else None,
        "frees": not (vm.passed_through or _locked(vm) or _huge(vm)),
    }


def not_told(vm: ExaminedVm) -> list[str]:
    """Return what could not be found out about a VM that answers, a sentence each."""
    sentences: list[str] = []
    if vm.reached != "up":
        return sentences
    balloon = vm.balloon
    if balloon is not None and balloon.driver is None:
        sentences.append(
            f"QEMU {vm.qemu} is not asked what its driver negotiated: the command may end this version"
        )
    if balloon is not None and balloon.free_page_reporting.offered is None:
        sentences.append(f"QEMU {vm.qemu} does not know free-page-reporting")
    if any(backend.shared is None for backend in vm.backends):
        sentences.append(f"QEMU {vm.qemu} does not tell whether its memory is shared")
    return sentences
