"""The tick: takes a snapshot of the host, lets the policy decide, and sends the decisions.

`TickSchedule` says when a tick comes: every two seconds; up to ten times a second while guests are thin,
growing or being moved; at once when a guest becomes thin. A slow VM delays no other: each has at most one
target on its way, in a task of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from qmpballoon.agent.actuator import Actuator
from qmpballoon.agent.context import Context
from qmpballoon.agent.holds import Holds
from qmpballoon.agent.host_monitor import HostMonitor
from qmpballoon.agent.limits import checked_target
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.spec import boot_time_s
from qmpballoon.agent.supervisor import Supervisor
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.errors import ConnectionLost, NoBalloon, OutOfRange, QmpError, RequestRefused
from qmpballoon.log import log_always, log_event, log_withheld
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, HostStatus, utc_now
from qmpballoon.policy.calm import CalmStep
from qmpballoon.policy.decided import Decided, Figures, figures_of
from qmpballoon.policy.guard import Guard, GuardState, as_charged
from qmpballoon.policy.in_force import is_over, stands_until_s
from qmpballoon.policy.reasons import KEPT_HOLDS, MAY_NEED_A_PERSON, WORDS
from qmpballoon.policy.registry import guarded
from qmpballoon.policy.release import released
from qmpballoon.policy.schedule import is_at_rest
from qmpballoon.policy.snapshot import Decision, Decisions, GuestSnapshot, Hold, SetTarget, Snapshot
from qmpballoon.units import MIB, round_up_to_page

_FIT_FOR_A_TARGET: Final = ("ok", "stale", "no-stats")  # its driver is up and the grace time is over
_SLEPT_S: Final = 10.0  # after a sleep of this length no sample is fresh


@dataclass(slots=True)
class _Published:
    """What was last published about one VM's decisions."""

    observed: int | None = None  # the last target that observe would have sent
    refuted: bool = False  # RSS refutes what the guest reports to hold
    refused: str | None = None  # why its manual target is not allowed


class Governor:
    """Controls one host: ticks, lets the policy decide, and sends targets through the actuator."""

    def __init__(
        self, context: Context, registry: Registry, supervisor: Supervisor, actuator: Actuator
    ) -> None:
        self.holds = Holds(context.feed.host_event)
        self.ticked = asyncio.Event()  # set, and replaced, after each tick
        self._context = context
        self._registry = registry
        self._supervisor = supervisor
        self._actuator = actuator
        self._asleep_s = _asleep_s()
        self._sending: dict[VmId, asyncio.Task[None]] = {}
        self._published: dict[VmId, _Published] = {}
        self._guard: Guard[Any] = guarded(context.policy)
        self._state: GuardState[Any] = self._guard.start()
        self._seen_last = Snapshot(now_s=time.monotonic(), guests=(), budget=0, mem_total=0)
        self._last_step: CalmStep | None = None  # None: it decided something, or what it depends on changed
        self._as_automatic: dict[int, tuple[GuestSnapshot, GuestSnapshot]] = {}  # by id() of the guest seen
        self._reason_due_s = float("inf")  # by the context's clock: when a reason that was decided may follow
        self._host_at_s = float("-inf")
        self._monitor = HostMonitor(context.feed)
        self._monitor.note_in_force(context.policy, context.mode)

    def choose(self, policy: str | None, mode: str | None) -> None:
        """Put a policy or a mode in force, over the configured ones."""
        before = self._context.store.chosen
        self._context.store.choose(policy or before[0], mode or before[1])
        log_event("policy-chosen", policy=self._context.policy, mode=self._context.mode)
        self.renew()

    def renew(self) -> None:
        """Apply the policy and the modes that are in force now, and tick soon."""
        self._monitor.note_in_force(self._context.policy, self._context.mode)
        self._last_step = None
        if self._guard.name != self._context.policy:
            self._guard = guarded(self._context.policy)
            self._state = self._guard.start()
        for vm in self._registry:
            vm.renew_mode()
        self._context.ticks.soon()

    # ── the tick ─────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Tick for as long as the agent runs."""
        async with asyncio.TaskGroup() as sends:
            while True:
                with self._context.ticks.tick():
                    self._tick(sends)
                self.ticked.set()
                self.ticked = asyncio.Event()
                await self._context.ticks.due()

    def _tick(self, sends: asyncio.TaskGroup) -> None:
        now_s = time.monotonic()
        elapsed_s = now_s - self._seen_last.now_s + self._age_samples_by_sleep()
        for vm in self._registry:
            vm.renew_mode()
            vm.check_life()
        whole = now_s - self._host_at_s >= self._context.ticks.calm_s / 2
        if whole:
            self._monitor.look(self._context.configuration.host, self._charges)
        snapshot = self._seen_last = self._seen(now_s, elapsed_s)
        if self._must_step(snapshot):
            self._state, decisions = self._guard.step(self._state, snapshot)
            is_calm = all(isinstance(decision, Hold) for decision in decisions.values())
            self._last_step = CalmStep(snapshot, self._healths()) if is_calm else None
            self._context.ticks.rests(is_at_rest=is_at_rest(snapshot, decisions))
            self._carry_out(decisions, sends)
        if whole:
            self._host_at_s = now_s
            self.holds.expire(now_s)
            self._supervisor.tell_unreadable()
            self._supervisor.forget_absent_vms()
            snapshot = as_charged(snapshot, self._state)
            self._monitor.judge(snapshot, lent=self._state.lent)
            self._monitor.note_lateness(self._context.wheel.lateness_s())
            self._context.feed.host_changed(self.host(snapshot))
            self._context.feed.sampled()
            log_withheld()

    def _must_step(self, snapshot: Snapshot) -> bool:
        """Tell whether a step may decide or explain something else than the last one."""
        if self._last_step is None or self._sending or self._context.clock() >= self._reason_due_s:
            return True
        return not self._last_step.holds_for(snapshot, self._healths())

    def _healths(self) -> tuple[str, ...]:
        return tuple(vm.status.health for vm in self._registry)

    def _carry_out(self, decisions: Decisions, sends: asyncio.TaskGroup) -> None:
        self._reason_due_s = float("inf")
        self._note_judgements()
        self._published = {
            vm.id: published for vm in self._registry if (published := self._published.get(vm.id)) is not None
        }
        for vm in self._registry:
            if vm.is_taken_over:  # what is known of it may be another life's
                continue
            decision = decisions.get(vm.id)
            if decision is not None:
                self._act(vm, decision, sends)
            elif vm.run.reason is not None:  # its memory is freed, or its size is unknown
                self._explain(vm, "no-decision" if vm.status.answers else "silent")
            self._renew_target(vm, sends)

    def snapshot(self) -> Snapshot:
        """Return the host now, its guests charged as the guard judged them at the last tick."""
        return as_charged(self._seen(time.monotonic(), self._context.ticks.calm_s), self._state)

    def _seen(self, now_s: float, elapsed_s: float) -> Snapshot:
        """Return what the guard sees of the host; while the host only observes, all VMs as automatic."""
        guests = [guest for vm in self._registry if (guest := vm.guest()) is not None]
        if self._context.mode == "observe":
            before = self._as_automatic
            pairs = [before.get(id(guest)) or (guest, replace(guest, mode="auto")) for guest in guests]
            self._as_automatic = {id(guest): (guest, automatic) for guest, automatic in pairs}
            guests = [automatic for _, automatic in pairs]
        sample, budget = self._monitor.sample, self._monitor.budget
        return Snapshot(
            now_s=now_s,
            guests=tuple(guests),
            budget=sum(guest.size for guest in guests) if budget is None else budget,
            mem_total=self._monitor.for_guests or 0,
            mem_available=sample.mem_available,
            reserve=self._monitor.reserve,
            held_back=self.holds.total,
            overload=self._context.configuration.policy.overload,
            elapsed_s=elapsed_s,
        )

    def _charges(self) -> dict[int | None, int]:
        """Return what the guests are charged, by the pids of their QEMUs.

        None has what the guests without a known process (behind a proxy) hold by their own figures.
        """
        charges: dict[int | None, int] = {}
        for vm in self._registry:
            guest, life = vm.guest(), vm.run.life
            if guest is not None and life is not None:
                charges[life.pid] = guest.charge
            elif guest is not None:
                held = guest.sample.held if guest.sample else None
                charges[None] = charges.get(None, 0) + (guest.charge if held is None else held)
        return charges

    def host(self, snapshot: Snapshot | None = None) -> HostStatus:
        """Return the host's figures; ``snapshot`` is a current one, if there is one already."""
        now_s = time.monotonic()
        return self._monitor.status(
            snapshot or self.snapshot(),
            [vm.status for vm in self._registry],
            policy=self._context.policy,
            mode=self._context.mode,
            unidentified=self._supervisor.unidentified,
            holds=self.holds.listed(now_s),
        )

    def _act(self, vm: ManagedVm, decision: Decision, sends: asyncio.TaskGroup) -> None:
        published = self._published.setdefault(vm.id, _Published())
        if vm.facts.mode != "observe":
            published.observed = None  # when it is observed again, the first decision is news
        if isinstance(decision, Hold):
            if vm.run.returns_to is None:
                self._explain(vm, decision.why)
            return
        target = round_up_to_page(decision.target)
        before = vm.run.target
        if before is not None and abs(before - target) < MIB:
            self._explain(vm, decision.why)
            return
        if vm.facts.mode == "observe":
            self._publish_observed(vm, published, target, decision)
            return
        if vm.id in self._sending:
            return
        if vm.facts.mode == "manual" and vm.run.returns_to is None:  # raised in an emergency; the mode stays
            vm.spec.set_manual_target(target)
        self._send(vm, target, decision.why, sends)

    def _explain(self, vm: ManagedVm, why: str) -> None:
        """Put the reason of a hold in force, if it is a problem or the previous reason is over."""
        mode, reason = vm.facts.mode, vm.run.reason
        if mode != "auto" and self._context.mode != "observe":  # then the policy does not decide about it
            if reason is None:
                return
            why = mode
        if reason is not None and reason.why == why:
            return
        judgement, past = self._state.judgements.get(vm.id), self._state.pasts.get(vm.id)
        is_problem = judgement is not None and why == judgement.why
        actual, target = vm.status.actual or 0, vm.run.target
        is_needed = past is not None and (past.emergency or (mode == "manual" and 2 * past.held > actual))
        now_s = self._context.clock()
        if is_problem or is_over(
            reason,
            now_s,
            is_relieved=not is_needed,
            is_at_target=target is None or vm.status.is_at(target),
        ):
            if is_problem and why in MAY_NEED_A_PERSON:
                log_always("problem", WORDS[why].means, vm=vm.id, why=why)
            vm.explain(why)
            if why in KEPT_HOLDS:
                vm.history.note(Decided(time.time(), why, "held", self.figures(vm), policy=vm.facts.policy))
        elif reason is not None and (due_s := stands_until_s(reason)) > now_s:
            self._reason_due_s = min(self._reason_due_s, due_s)

    def figures(self, vm: ManagedVm) -> Figures:
        """Return the figures from which the last tick decided about a VM."""
        return figures_of(vm.guest(), self._state.pasts.get(vm.id), self._seen_last)

    def _send(self, vm: ManagedVm, target: int, why: str, sends: asyncio.TaskGroup) -> None:
        mode, figures = vm.mode, self.figures(vm)

        def still() -> bool:
            """Tell whether no request came first that forbids it."""
            is_below = mode == "auto" and target < (vm.limits.floor or 0)
            return vm.mode == mode and not is_below and vm.status.health != "migrating"

        async def send() -> None:
            try:
                if still():
                    await self._actuator.send(vm, target, why=why, figures=figures, still=still)
            except RequestRefused:
                pass  # the next tick decides anew
            except (ConnectionLost, NoBalloon, QmpError) as error:
                log_event("target-not-sent", str(error), level=logging.WARNING, vm=vm.id)
            finally:
                self._sending.pop(vm.id, None)

        self._sending[vm.id] = sends.create_task(send(), name=f"target of {vm.id}")

    def _publish_observed(
        self, vm: ManagedVm, published: _Published, target: int, decision: SetTarget
    ) -> None:
        if published.observed is not None and abs(published.observed - target) < 8 * MIB:
            self._explain(vm, decision.why)
            return
        published.observed = target
        vm.explain(decision.why)
        policy = self._context.policy
        vm.history.note(
            Decided(time.time(), decision.why, "observed", self.figures(vm), target=target, policy=policy)
        )
        details = {
            "from": vm.status.actual,
            "to": target,
            "why": decision.why,
            "policy": policy,
            "sent": False,
        }
        self._context.feed.vm_event(vm.id, Event("decision", utc_now(), details))

    def _note_judgements(self) -> None:
        for name, judgement in self._state.judgements.items():
            vm = self._registry.get(name)
            if vm is not None:
                vm.judge(judgement.health)
                self._note_refuted(vm, refuted=judgement.refuted)

    def _note_refuted(self, vm: ManagedVm, *, refuted: bool) -> None:
        published = self._published.setdefault(vm.id, _Published())
        if published.refuted == refuted:
            return
        published.refuted = refuted
        sample = vm.facts.seen.sample if vm.facts.seen else None
        details = {"held": sample.held if sample else None, "rss": vm.facts.rss}
        if refuted:
            log_event(
                "claim-refuted",
                "the guest reports to hold more than its QEMU has resident; RSS counts instead",
                level=logging.WARNING,
                vm=vm.id,
                **details,
            )
        self._context.feed.vm_event(
            vm.id, Event("claim-refuted" if refuted else "claim-plausible", utc_now(), details)
        )

    def _renew_target(self, vm: ManagedVm, sends: asyncio.TaskGroup) -> None:
        """Send what this life has not received yet: the target to which a pulse that was cut off returns.

        Else a manual target, once its driver can follow it.
        """
        run, status = vm.run, vm.status
        if vm.id in self._sending or run.is_pulsed:
            return
        if run.returns_to is not None:
            if status.answers and status.health not in ("no-balloon", "migrating"):
                self._send(vm, max(run.returns_to, run.target or 0), "pulse", sends)
            return
        target = vm.spec.manual_target
        if vm.facts.mode != "manual":
            return
        if target is None or status.health not in _FIT_FOR_A_TARGET:
            return
        published = self._published.setdefault(vm.id, _Published())
        try:
            checked_target(status, target)
        except (OutOfRange, ConnectionLost) as error:
            if published.refused != str(error):
                published.refused = str(error)
                stays = "; the guest keeps it" if target == run.target else ""
                log_event("manual-target-refused", f"{error}{stays}", level=logging.WARNING, vm=vm.id)
            return
        published.refused = None
        if target != run.target:
            self._send(vm, target, "manual", sends)

    def release_all(self) -> dict[ManagedVm, int]:
        """Return how far each automatic VM may grow within the host's reserve, for a clean stop."""
        if self._context.mode == "observe":  # then all VMs look automatic
            return {}
        targets = released(self._seen(time.monotonic(), self._context.ticks.calm_s))
        return {vm: targets[vm.id] for vm in self._registry if vm.id in targets}

    def why_refused(self) -> Mapping[VmId, str]:
        """Return why VMs are not shrunk now."""
        return {vm: judgement.why for vm, judgement in self._state.judgements.items() if judgement.why}

    def _age_samples_by_sleep(self) -> float:
        """Add the time that the host slept to the age of all samples, and return it.

        The monotonic clock omits it.
        """
        asleep_s = _asleep_s()
        slept_s, self._asleep_s = asleep_s - self._asleep_s, asleep_s
        if slept_s > _SLEPT_S:
            log_event("host-slept", "all samples count as stale", seconds=round(slept_s))
            for vm in self._registry:
                vm.age_sample(slept_s)
        return max(0.0, slept_s)


def _asleep_s() -> float:
    return boot_time_s() - time.monotonic()
