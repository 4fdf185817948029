"""The blocking API, on a simulated QEMU that runs on a thread of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import pytest
from scripted_peer import PATIENCE_S
from simulated_vm import SimulatedVm, simulated

import qmpballoon
from qmpballoon import api, sync
from qmpballoon.loop_thread import LoopClosed, LoopThread
from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.units import MIB


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    before, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    assert set(os.listdir("/proc/self/fd")) == before


@contextmanager
def interrupted_by_alarm(after_s: float) -> Iterator[None]:
    """Raise ZeroDivisionError in the main thread once, as pytest-timeout does with an error of its own."""

    def raises(*_: object) -> None:
        raise ZeroDivisionError

    before = signal.signal(signal.SIGALRM, raises)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_example_of_the_module_works(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "web1.qmp") as qemu, qmpballoon.sync.connect(qemu.path) as vm:
        vm.ready(timeout_s=PATIENCE_S)
        assert vm.set_target("128MiB", wait_s=PATIENCE_S) == 128 * MIB
        state = vm.state()
        assert state.actual == 128 * MIB
        assert state.guest is not None
        assert state.guest.available == qemu.look(lambda qemu: qemu.guest.available)
        assert (vm.name, vm.qemu, vm.pid) == ("web1", "7.2.22", os.getpid())
        assert vm.wait_for(lambda seen: seen.balloon == 128 * MIB, timeout_s=PATIENCE_S).target == 128 * MIB
        assert vm.has_reported
        assert vm.driver_up() is True
        assert qemu.polling_interval_s() == 1
    with simulated(sockets_dir / "b.qmp") as qemu, sync.connect(qemu.path) as vm:
        vm.state()
        assert qemu.polling_interval_s() == 1


def test_the_polling_interval_is_restored(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "a.qmp") as qemu:
        with sync.connect(qemu.path) as vm:
            vm.state()
            assert qemu.polling_interval_s() == 1
        assert qemu.polling_interval_s() == 0


def test_it_has_the_names_and_arguments_of_the_asynchronous_one() -> None:
    def public(kind: type) -> dict[str, object]:
        return {name: value for name, value in vars(kind).items() if not name.startswith("_")}

    assert public(sync.Vm).keys() == public(api.Vm).keys()
    for name, method in public(sync.Vm).items():
        if callable(method):
            other = signature(public(api.Vm)[name])  # type: ignore[arg-type]
            assert list(signature(method).parameters.values()) == list(other.parameters.values()), name
    assert list(signature(sync.connect).parameters.values()) == list(
        signature(api.connect).parameters.values()
    )


async def test_it_works_where_a_loop_runs(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "a.qmp") as qemu:
        with sync.connect(qemu.path) as vm:
            assert vm.state().size == 256 * MIB
        assert asyncio.get_running_loop().is_running()


def test_it_works_on_uvloop(sockets_dir: Path) -> None:
    pytest.importorskip("uvloop")
    program = """
import asyncio, sys, uvloop
import warnings; warnings.simplefilter("ignore", DeprecationWarning)  # of policies, from Python 3.14 on
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
from qmpballoon import sync
with sync.connect(sys.argv[1]) as vm:
    assert isinstance(vm._loop._loop, uvloop.Loop)
    print(vm.set_target("128MiB", wait_s=10), vm.state().actual)
"""
    with simulated(sockets_dir / "a.qmp") as qemu:
        done = subprocess.run(
            [sys.executable, "-c", program, qemu.path], capture_output=True, text=True, timeout=60
        )
    assert (done.stdout.split(), done.stderr) == ([str(128 * MIB)] * 2, "")


def test_errors_are_those_of_the_asynchronous_one(sockets_dir: Path) -> None:
    with pytest.raises(qmpballoon.Unreachable, match="no such socket"):
        sync.connect(sockets_dir / "none.qmp", timeout_s=0.01).__enter__()
    with simulated(sockets_dir / "a.qmp", guest=GuestSpec(driver=False)) as qemu:
        with sync.connect(qemu.path) as vm:
            with pytest.raises(qmpballoon.NotReady, match="driver is not up"):
                vm.ready(timeout_s=0.05)
            with pytest.raises(qmpballoon.NotReached) as caught:
                vm.set_target("128MiB", wait_s=0.05)
            assert caught.value.target == 128 * MIB
            with pytest.raises(qmpballoon.InvalidSize):
                vm.set_target("128M")
            with pytest.raises(qmpballoon.MonitorBusy), sync.connect(qemu.path, timeout_s=0.05):
                pass
        with pytest.raises(LookupError, match="mine"), sync.connect(qemu.path):
            raise LookupError("mine")


def test_after_its_end_a_vm_is_a_lost_connection(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "a.qmp") as qemu:
        with sync.connect(qemu.path) as vm:
            events = vm.events()
        for use in (vm.state, lambda: next(events), lambda: vm.squeeze("50%").__enter__()):
            with pytest.raises(qmpballoon.ConnectionLost, match="closed by us"):
                use()


def test_a_killed_qemu_is_told_at_once_and_leaves_nothing_open(sockets_dir: Path) -> None:
    stuck = GuestSpec(behaviour=Behaviour.STUCK)
    with simulated(sockets_dir / "a.qmp", guest=stuck) as qemu, sync.connect(qemu.path) as vm:
        vm.state()
        killer = threading.Timer(0.05, qemu.die)
        killer.start()
        with pytest.raises(qmpballoon.ConnectionLost):
            vm.set_target("128MiB", wait_s=PATIENCE_S)
        with pytest.raises(qmpballoon.ConnectionLost):
            vm.state()
        with pytest.raises(qmpballoon.ConnectionLost):
            list(vm.events())
        killer.join()


def test_events_are_iterated_over(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "a.qmp") as qemu, sync.connect(qemu.path) as vm:
        vm.set_target("128MiB", wait_s=PATIENCE_S)
        assert next(vm.events()).event == "balloon-change"
        assert next(vm.events()).event == "balloon-change"  # each iterator begins with the connection


def test_an_interrupted_call_leaves_the_connection_usable(sockets_dir: Path) -> None:
    stuck = GuestSpec(behaviour=Behaviour.STUCK)
    with simulated(sockets_dir / "a.qmp", guest=stuck) as qemu, sync.connect(qemu.path) as vm:
        with pytest.raises(ZeroDivisionError), interrupted_by_alarm(0.05):
            vm.set_target("128MiB", wait_s=3600)
        assert vm.state(fresh_s=0).target == 128 * MIB
        with pytest.raises(ZeroDivisionError), interrupted_by_alarm(0.05):
            for _ in vm.events():
                pass
        assert vm.state(fresh_s=0).target == 128 * MIB


def test_an_interrupted_connect_leaves_nothing_open(sockets_dir: Path) -> None:
    with (
        simulated(sockets_dir / "a.qmp", faults=Faults(silent_greeting=True)) as qemu,
        pytest.raises(ZeroDivisionError),
        interrupted_by_alarm(0.05),
        sync.connect(qemu.path, timeout_s=3600),
    ):
        pass


def test_several_threads_call_at_the_same_time(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "a.qmp") as qemu, sync.connect(qemu.path) as vm:
        sizes: list[int] = []
        threads = [threading.Thread(target=lambda: sizes.append(vm.state().size)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert sizes == [256 * MIB] * 4


def test_a_condition_that_calls_the_vm_is_refused(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "a.qmp") as qemu, sync.connect(qemu.path) as vm:
        with pytest.raises(RuntimeError, match="within another"):
            vm.wait_for(lambda _: bool(vm.state()), timeout_s=PATIENCE_S)
        assert vm.state().size == 256 * MIB


def test_a_dangerous_target_is_a_warning_at_the_line_of_the_caller(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "a.qmp") as qemu, sync.connect(qemu.path) as vm:
        vm.state()
        with pytest.warns(qmpballoon.DangerousTarget) as caught:
            vm.set_target("16MiB")
        assert [warning.filename for warning in caught] == [__file__]


def test_squeeze_sets_back_what_it_found(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "a.qmp") as qemu, sync.connect(qemu.path) as vm:
        with vm.squeeze("160MiB") as target:
            assert (target, vm.state().actual) == (160 * MIB, 160 * MIB)
            with vm.squeeze("50%"):
                assert vm.state().actual == 128 * MIB
            assert vm.state().actual == 160 * MIB
        assert vm.state().actual == 256 * MIB
        with pytest.raises(LookupError), vm.squeeze("160MiB"):
            raise LookupError
        vm.wait_for(lambda state: state.actual == 256 * MIB, timeout_s=PATIENCE_S)


def test_a_squeeze_that_is_not_reached_is_set_back(sockets_dir: Path) -> None:
    stuck = GuestSpec(behaviour=Behaviour.STUCK)
    with simulated(sockets_dir / "a.qmp", guest=stuck) as qemu, sync.connect(qemu.path) as vm:
        with pytest.raises(qmpballoon.NotReached), vm.squeeze("160MiB", wait_s=0.05):
            pytest.fail("not reached")
        assert qemu.look(lambda qemu: qemu.guest.target) == 256 * MIB


def die_and_fail(qemu: SimulatedVm) -> None:
    qemu.die()
    raise ZeroDivisionError


def test_a_squeezed_vm_whose_qemu_ends_raises_the_error_of_the_block(sockets_dir: Path) -> None:
    with simulated(sockets_dir / "a.qmp") as qemu, sync.connect(qemu.path) as vm:
        with pytest.raises(ZeroDivisionError), vm.squeeze("160MiB"):
            die_and_fail(qemu)
        with pytest.raises(qmpballoon.ConnectionLost):
            vm.state()


def test_a_process_that_ends_ends_the_wait(sockets_dir: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"])
    ended = f"process \\(pid {process.pid}\\) has ended: it exited with status 3"
    with pytest.raises(qmpballoon.Unreachable, match=ended):
        sync.connect(sockets_dir / "a.qmp", timeout_s=3600, process=process).__enter__()
    process.wait()
    killed = subprocess.Popen(["sleep", "600"])
    killed.kill()
    with pytest.raises(qmpballoon.Unreachable, match="killed by signal 9"):
        sync.connect(sockets_dir / "a.qmp", timeout_s=3600, process=killed).__enter__()
    killed.wait()


async def test_a_process_of_asyncio_that_ends_ends_the_wait(sockets_dir: Path) -> None:
    process = await asyncio.create_subprocess_exec("false")
    with pytest.raises(qmpballoon.Unreachable, match="status 1"):
        async with qmpballoon.connect(sockets_dir / "a.qmp", timeout_s=3600, process=process):
            pass
    await process.wait()


def test_a_daemon_outlives_the_process_that_was_started(sockets_dir: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        with simulated(sockets_dir / "a.qmp") as qemu, sync.connect(qemu.path, process=process) as vm:
            assert vm.state().size == 256 * MIB


def test_a_process_that_ends_instead_of_a_greeting(sockets_dir: Path) -> None:
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(1);"
        "s.accept(); sys.exit(7)"
    )
    with (
        subprocess.Popen([sys.executable, "-c", program, sockets_dir / "a.qmp"]) as process,
        pytest.raises(qmpballoon.Unreachable, match="status 7"),
    ):
        sync.connect(sockets_dir / "a.qmp", timeout_s=3600, process=process).__enter__()


def test_a_closed_loop_runs_nothing() -> None:
    async def nothing() -> None:
        pass

    with LoopThread("closed") as loop:
        loop.call(nothing())
    loop.close()
    with pytest.raises(LoopClosed):
        loop.call(nothing())


def test_closing_ends_a_call_of_another_thread() -> None:
    loop, outcomes = LoopThread("closing"), list[type]()
    began = threading.Event()

    async def forever() -> None:
        began.set()
        await asyncio.Event().wait()

    def call() -> None:
        try:
            loop.call(forever())
        except LoopClosed as error:
            outcomes.append(type(error))

    thread = threading.Thread(target=call)
    thread.start()
    assert began.wait(PATIENCE_S)
    loop.close()
    thread.join(PATIENCE_S)
    assert outcomes == [LoopClosed]
