"""All VMs of this agent, indexed by id, monitor path and life, and which connector serves which life.

Two sockets of one life are one VM. The first path in sorted order serves it; the others stay unused
until that one is gone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from qmpballoon.addresses import name_from
from qmpballoon.agent.answering import Alike, Answering, Serving
from qmpballoon.agent.context import Context
from qmpballoon.agent.names import Names
from qmpballoon.agent.run import Identity
from qmpballoon.agent.state_file import KnownSocket
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.config import Claim, rename_for, right_to, vm_settings
from qmpballoon.log import log_event
from qmpballoon.model.names import VmId, safe_name
from qmpballoon.model.records import Event, Life, utc_now
from qmpballoon.procfs import life_of


class Registry:
    """The VMs, their names, and which connector serves which life."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._names = Names(context)
        self._by_id: dict[VmId, ManagedVm] = {}
        self._by_path: dict[str, ManagedVm] = {}
        self._by_life: dict[str, ManagedVm] = {}  # also lives that an earlier run of the agent knew
        self._lives: dict[ManagedVm, set[str]] = {}  # the same, by VM
        self._by_identity: dict[Identity, dict[ManagedVm, None]] = {}
        self._identities: dict[ManagedVm, Identity] = {}
        self._serving: dict[Life, Serving] = {}
        self._life_at: dict[str, Life] = {}  # the same, by path
        self._given_up: dict[str, asyncio.Event] = {}  # by path, where somebody waits for it
        self._answering: dict[str, Answering] = {}  # by path
        self._alike: dict[tuple[str | None, str | None], Alike] = {}  # the same, by what they report
        self._paths: dict[Life, set[str]] = {}  # of its sockets that were connected so far
        self._stems: dict[Life, str] = {}  # the names of QEMUs without -name: from the first of these

    def __iter__(self) -> Iterator[ManagedVm]:
        """Iterate over the VMs as they are now; they may come and go meanwhile."""
        return iter(tuple(self._by_id.values()))

    def __len__(self) -> int:
        """Return how many VMs there are."""
        return len(self._by_id)

    def get(self, vm: VmId) -> ManagedVm | None:
        """Return the VM of this id, if there is one."""
        return self._by_id.get(vm)

    def at(self, path: str) -> ManagedVm | None:
        """Return the VM whose monitor is this socket, if it is known."""
        return self._by_path.get(path)

    # ── VMs come, go and are renamed ─────────────────────────────────────────────────────────────

    def remember(self, path: str, known: KnownSocket) -> None:
        """Set up a VM that an earlier run knew; it is offline until its monitor answers."""
        if VmId(known.vm) in self._by_id:  # only in an edited state file; the first entry keeps the name
            self._context.store.know(path, None)
            return
        self._add(VmId(known.vm), known.name, Claim(known.name, path, known.owner))

    def answered(self, path: str, identity: Identity, life: Life | None) -> ManagedVm:
        """Return the VM that answered at this socket, under its name; a new or renamed one is set up."""
        vm = self.named(path, identity, life)
        if life is not None:
            self._belongs(str(life), vm)
        self._forget_identity(vm)
        self._identities[vm] = identity
        self._by_identity.setdefault(identity, {})[vm] = None
        return vm

    def _belongs(self, life: str, vm: ManagedVm) -> None:
        before = self._by_life.get(life)
        if before is not None:
            self._lives[before].discard(life)
        self._by_life[life] = vm
        self._lives.setdefault(vm, set()).add(life)

    def _forget_identity(self, vm: ManagedVm) -> None:
        if (identity := self._identities.pop(vm, None)) is not None:
            del self._by_identity[identity][vm]
            if not self._by_identity[identity]:
                del self._by_identity[identity]

    def named(self, path: str, identity: Identity, life: Life | None = None) -> ManagedVm:
        """Return the VM at this socket under the name that the configuration in force gives it.

        ``life`` is that of a QEMU which has just answered.
        """
        configuration, store = self._context.configuration, self._context.store
        claim = Claim(self._names.accepted(path, identity.name), path, identity.owner)
        name = rename_for(configuration, claim) or claim.name
        base = safe_name(name)
        vm, known = self.at(path), store.sockets.get(path)
        if vm is None and (moved := self._moved(VmId(base), claim, life)) is not None:
            self._move_to(moved, path)
            vm, known = moved, store.sockets.get(path)
        if vm is not None and known is not None and known.base == base and self._may_stay(vm, base, claim):
            if known.owner not in (None, claim.owner):
                self._names.doubt(base, vm.id, claim, "new-owner")
            vm.spec.settings = vm_settings(configuration, claim)
            vm.name = name
            self._is_at(path, KnownSocket(vm.id, base, name, claim.owner))
            vm.touch()
            return vm
        if vm is not None:
            log_event("vm-renamed", vm=vm.id, now=name)
            vm.retired = True
            self.drop(vm, why=None)
        free = self._names.free_id(base, claim, self._by_id)
        if vm is not None:  # the target belongs to the life, not to the name
            before = store.kept(vm.id)
            store.keep(free, life=before.life, sent=before.sent, returns_to=before.returns_to)
        self._is_at(path, KnownSocket(free, base, name, claim.owner))
        feed = self._context.feed
        if vm is not None:
            feed.vm_event(vm.id, Event("renamed", utc_now(), {"from": vm.id, "to": free}))
        new = self._add(free, name, claim)
        if vm is None:
            feed.vm_event(free, Event("added", utc_now(), {"name": name, "socket": Path(path).name}))
        else:
            new.history = vm.history
        return new

    def _may_stay(self, vm: ManagedVm, base: str, claim: Claim) -> bool:
        """Tell whether a VM keeps its name in topics: not one reserved for others, nor one in its place."""
        right = right_to(self._context.configuration, claim, base)
        if vm.id == base:
            return right is not False
        return right is not True or VmId(base) in self._by_id

    def _moved(self, vm_id: VmId, claim: Claim, life: Life | None) -> ManagedVm | None:
        """Return the VM of this name if this is its new socket.

        Its old socket is gone, or is another one of this life; its process is gone, or is this life's.
        """
        vm = self._by_id.get(vm_id)
        if vm is None or vm.connection == "up" or claim.owner is None:
            return None
        if vm.path not in self._sockets_of(life) and os.path.lexists(vm.path):
            return None
        known = self._context.store.sockets.get(vm.path)
        others = self._lives.get(vm, set()) - {str(life)}
        if known is None or known.owner != claim.owner or any(map(_runs, others)):
            return None
        is_reserved = right_to(self._context.configuration, claim, vm_id) is False
        return None if is_reserved else vm

    def _is_at(self, path: str, known: KnownSocket) -> None:
        """Remember the name of a socket, and whose it is."""
        self._context.store.know(path, known)
        self._context.store.keep(VmId(known.vm), lazily=True, socket=path, owner=known.owner)

    def twin(self, path: str, identity: Identity) -> ManagedVm | None:
        """Return the VM at another path whose QEMU has this name, UUID and owner.

        None if this path has a VM.
        """
        if path in self._by_path:
            return None
        return next(iter(self._by_identity.get(identity, ())), None)

    def are_one(self, *, serving: str, second: str) -> None:
        """Make one VM of those known at two sockets of one QEMU, at ``serving``.

        Of two the one that has the QEMU's name stays, with what was set for it: two of one QEMU are known if
        the socket that answers first was not its socket before. A session that feeds another VM is ended.
        """
        found = [vm for vm in (self.at(serving), self.at(second)) if vm is not None]
        if not found:
            return
        answers = next((vm for vm in found if vm.connection == "up"), found[0])
        known = self._context.store.sockets
        here = known.get(answers.path)
        stays = answers
        for vm in found:
            there = known.get(vm.path)
            if here and there and vm.id == here.base and there.owner == here.owner:
                stays = vm
        feeds_another = self._answering.get(serving) if answers.path == serving else None
        if stays.path != serving:
            self.take_over(stays, serving)
            if feeds_another is not None:
                feeds_another.connector.kick()
        self.is_no_vm(second)

    def take_over(self, vm: ManagedVm, path: str) -> None:
        """Move a VM to the monitor at another path: its QEMU was migrated there, or it is a better one.

        A VM that was known there is dropped: the two are one.
        """
        if (answering := self._answering.get(vm.path)) is not None:
            answering.connector.kick()
        self.is_no_vm(path)
        self._move_to(vm, path)

    def is_no_vm(self, path: str) -> None:
        """Drop the VM that was known at this socket, if any: it is another monitor of a known VM."""
        if (vm := self.at(path)) is not None:
            log_event("vm-same", "it is another monitor of a VM that is known already", vm=vm.id, socket=path)
            self.drop(vm, why="same-vm")

    def drop(self, vm: ManagedVm, *, why: str | None) -> None:
        """Forget a VM: it leaves the lists, and its retained topics are cleared.

        ``why`` is the word in the event that it is removed; None: it only gets another name.
        """
        del self._by_id[vm.id], self._by_path[vm.path]
        for life in self._lives.pop(vm, ()):
            del self._by_life[life]
        self._forget_identity(vm)
        self._context.store.know(vm.path, None)
        vm.mark_unreachable("offline")
        vm.retired = True  # a request or a session that ends later must not bring it back
        self._context.feed.vm_gone(vm.id)
        if why is not None:
            self._context.feed.vm_event(vm.id, Event("removed", utc_now(), {"why": why}))

    def retire(self) -> None:
        """Publish nothing more about the VMs: the agent stops, and they keep running."""
        for vm in self:
            vm.retired = True

    # ── lives ────────────────────────────────────────────────────────────────────────────────────

    def connected(self, path: str, life: Life) -> None:
        """Note a socket of a process before its monitor answers: which answers first is chance."""
        self._paths.setdefault(life, set()).add(path)

    def stem_of(self, path: str, life: Life | None) -> str:
        """Return the name of a QEMU without ``-name``: the file stem of that of its sockets that sorts first.

        It stays for the QEMU's life, whichever sockets come later.
        """
        if life is None:
            return name_from(path)
        return self._stems.setdefault(life, name_from(min(self._sockets_of(life), default=path)))

    def _sockets_of(self, life: Life | None) -> Collection[str]:
        return () if life is None else self._paths.get(life, ())

    def may_serve(self, connector: Serving, life: Life) -> bool:
        """Tell whether this connector serves the life: the one whose path sorts first does."""
        holder = self._serving.get(life)
        if holder is connector:
            return True
        if holder is not None and holder.path < connector.path:
            return False
        if holder is not None:
            log_event("socket-second", "another socket of the same QEMU comes first", socket=holder.path)
            holder.kick()
        self._serving[life] = connector
        self._life_at[connector.path] = life
        self._move(life, connector.path)
        return True

    def served_before(self, connector: Serving, life: Life) -> str | None:
        """Return the path that sorts before this one and serves the life, if one does."""
        first = self.served_at(connector, life)
        return first if first is not None and first < connector.path else None

    def is_served_by_another(self, connector: Serving, life: Life) -> bool:
        """Tell whether another socket of the same QEMU serves this life."""
        return self.served_at(connector, life) is not None

    def served_at(self, connector: Serving, life: Life) -> str | None:
        """Return the path of the other socket of the same QEMU that serves this life, if one does."""
        holder = self._serving.get(life)
        return None if holder is None or holder is connector else holder.path

    def given_up(self, path: str) -> asyncio.Event:
        """Return what is set when the connector at this path does not serve its VM any more."""
        return self._given_up.setdefault(path, asyncio.Event())

    def gave_up(self, connector: Serving) -> None:
        """Note that the connector no longer serves any life."""
        if (answering := self._answering.pop(connector.path, None)) is not None:
            self._alike[answering.reported].leave(answering)
            if not self._alike[answering.reported].monitors:
                del self._alike[answering.reported]
        life = self._life_at.pop(connector.path, None)
        if life is not None and self._serving.get(life) is connector:
            del self._serving[life]
        if (given_up := self._given_up.pop(connector.path, None)) is not None:
            given_up.set()

    # ── monitors ─────────────────────────────────────────────────────────────────────────────────

    def enter(self, monitor: Answering) -> Alike:
        """Note that a monitor answers; return all those that report the same, this one among them."""
        self._answering[monitor.connector.path] = monitor
        alike = self._alike.setdefault(monitor.reported, Alike())
        alike.enter(monitor)
        return alike

    def answers_at(self, path: str) -> bool:
        """Tell whether the monitor at this path answers."""
        return path in self._answering

    def forget_ended_lives(self) -> None:
        """Drop the entries of processes that have ended."""
        known = self._paths
        ended = [life for life in known if life not in self._serving and life_of(life.pid) != life]
        for life in ended:
            del known[life]
            self._stems.pop(life, None)
            if (vm := self._by_life.pop(str(life), None)) is not None:
                self._lives[vm].discard(str(life))

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _add(self, vm_id: VmId, name: str, claim: Claim) -> ManagedVm:
        settings = vm_settings(self._context.configuration, claim)
        vm = ManagedVm(vm_id, name, claim.socket, settings, self._context)
        self._by_id[vm_id] = self._by_path[claim.socket] = vm
        life = self._context.store.kept(vm_id).life
        if life is not None and life not in self._by_life:
            self._belongs(life, vm)
        self._context.feed.vm_changed(vm.status)
        return vm

    def _move(self, life: Life, path: str) -> None:
        """Move the VM of a life to another socket of the same QEMU."""
        vm = self._by_life.get(str(life))
        if vm is None or vm.path == path:
            return
        if vm.run.life is not None and vm.run.life != life:
            return  # the VM has started another life since then
        self.are_one(serving=path, second=vm.path)

    def _move_to(self, vm: ManagedVm, path: str) -> None:
        store = self._context.store
        known = store.sockets.get(vm.path)
        store.know(vm.path, None)
        if known is not None:
            self._is_at(path, known)
        log_event("vm-moved", vm=vm.id, socket=path)
        del self._by_path[vm.path]
        vm.path = path
        self._by_path[path] = vm


def _runs(life: str) -> bool:
    """Tell whether the process of a life, as it is stored, still runs."""
    pid = life.partition("-")[0]
    return pid.isdecimal() and str(life_of(int(pid))) == life
