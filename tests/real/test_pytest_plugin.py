"""The pytest plugin as its users run it: in a pytest of its own, with real QEMUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qmpballoon
from qmpballoon.lab import image
from qmpballoon.lab.require import LabError
from qmpballoon.lab.vms import QemuVms
from qmpballoon.pytest_plugin import BalloonConnect, StartQemuVm
from qmpballoon.units import MIB

RUN_S = 300.0
STRICT = ("-p", "no:cacheprovider", "-W", "error", "-q")
ASYNCIO = ("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")
ONLY_PYTEST = ("-p", "no:asyncio", "-p", "no:xdist", "-p", "no:timeout", "-p", "no:hypothesispytest")
SUITE = """
    import os
    import threading

    import pytest

    import qmpballoon

    @pytest.fixture(autouse=True)
    def nothing_left_open():
        before, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
        yield
        assert set(threading.enumerate()) <= threads
        assert set(os.listdir("/proc/self/fd")) <= before

    def test_a_guest_is_squeezed(qemu_vm, balloon_connect):
        guest = qemu_vm()
        vm = balloon_connect(guest.socket)
        vm.ready(timeout_s=30)
        with vm.squeeze("112MiB"):
            assert guest.actual() <= 113 * 2**20
        assert guest.actual() >= 127 * 2**20

    def test_a_killed_qemu(qemu_vm, balloon_connect):
        guest = qemu_vm(driver=False)
        vm = balloon_connect(guest)
        with pytest.raises(qmpballoon.NotReady, match="driver is not up"):
            vm.ready(timeout_s=0.1)
        guest.kill()
        with pytest.raises(qmpballoon.ConnectionLost):
            vm.state()
        with pytest.raises(qmpballoon.Unreachable, match="nobody listens"):
            balloon_connect(guest, timeout_s=0.1)

    def test_a_qemu_of_its_own(balloon_connect, qemu_vm):
        guest = qemu_vm("qemu-system-x86_64", "-m", "64M", "-nodefaults", "-S", name="mine")
        vm = balloon_connect(guest)
        with pytest.raises(qmpballoon.NoBalloon):
            vm.state()
        assert (vm.name, vm.pid, guest.exit_status) == ("mine", guest.pid, None)
        assert guest.execute("query-status")["status"] == "prelaunch"
"""
UVLOOP = """
import asyncio, uvloop, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of policies, from Python 3.14 on
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
"""
IN_A_LOOP = """
    import asyncio
    import qmpballoon

    async def test_both_apis(qemu_vm, balloon_connect):
        guest = qemu_vm()
        vm = balloon_connect(guest)
        vm.ready(timeout_s=30)
        guest.execute("stop")
        assert vm.state().run_state == "paused"
        other = qemu_vm()
        async with qmpballoon.connect(other) as second:
            await second.set_target("112MiB", wait_s=30)
"""


@pytest.fixture
def run_suite(tmp_path: Path, guest_image: image.GuestImage) -> Callable[..., str]:
    """Run tests in a pytest of its own; return what it prints."""

    def run(suite: str, *options: str, fails: bool = False, uvloop: bool = False) -> str:
        (tmp_path / "test_mine.py").write_text(textwrap.dedent(suite))
        if uvloop:
            (tmp_path / "conftest.py").write_text(UVLOOP)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *STRICT, "--rootdir", tmp_path, *options, "test_mine.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=RUN_S,
        )
        assert done.returncode == fails, done.stdout + done.stderr
        return done.stdout

    return run


def test_the_fixtures_under_plain_pytest(run_suite: Callable[..., str]) -> None:
    assert "3 passed" in run_suite(SUITE, *ONLY_PYTEST)


def test_the_fixtures_on_two_processes_of_xdist(run_suite: Callable[..., str]) -> None:
    assert "3 passed" in run_suite(SUITE, "-n", "2", *ASYNCIO)


@pytest.mark.parametrize("uvloop", [False, True])
def test_the_fixtures_where_a_loop_runs(run_suite: Callable[..., str], uvloop: bool) -> None:
    if uvloop:
        pytest.importorskip("uvloop")
    assert "1 passed" in run_suite(IN_A_LOOP, *ASYNCIO, uvloop=uvloop)


def test_a_test_that_times_out_leaves_no_qemu(run_suite: Callable[..., str], tmp_path: Path) -> None:
    suite = """
        import signal
        from pathlib import Path

        import pytest

        def test_hangs(qemu_vm, balloon_connect):
            guest = qemu_vm("qemu-system-x86_64", "-m", "64M", "-S", "-device", "virtio-balloon")
            Path("pid").write_text(str(guest.pid))
            vm = balloon_connect(guest)
            signal.signal(signal.SIGALRM, lambda *_: pytest.fail("Timeout"))  # as pytest-timeout does
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            vm.set_target("32MiB", wait_s=3600)

        def test_goes_on(qemu_vm, balloon_connect):
            guest = qemu_vm("qemu-system-x86_64", "-m", "64M", "-nodefaults", "-S")
            assert balloon_connect(guest).qemu
    """
    printed = run_suite(suite, *ASYNCIO, fails=True)
    assert "1 failed, 1 passed" in printed
    assert "Timeout" in printed
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_a_killed_pytest_leaves_no_qemu(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from pathlib import Path\nimport time\n"
        "def test_hangs(qemu_vm):\n"
        "    guest = qemu_vm('qemu-system-x86_64', '-m', '64M', '-nodefaults', '-S')\n"
        "    Path('pid.new').write_text(str(guest.pid))\n"
        "    Path('pid.new').rename('pid')\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *STRICT, *ASYNCIO, "test_mine.py"], cwd=tmp_path
    ) as run:
        try:
            until((tmp_path / "pid").exists)
        finally:
            run.kill()
    pid = int((tmp_path / "pid").read_text())
    until(
        lambda: not Path(f"/proc/{pid}").exists() or b"State:\tZ" in Path(f"/proc/{pid}/status").read_bytes()
    )


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_plugin_imports_nothing_until_it_is_used(tmp_path: Path) -> None:
    ours = ("qmpballoon", "qemu") + (
        ("asyncio",) if sys.version_info < (3, 14) else ()
    )  # pdb imports it there
    program = (
        "import sys, pytest; pytest.main(['-p', 'no:asyncio', '-p', 'no:cacheprovider']);"
        f"print(sorted(n for n in sys.modules if n.startswith({ours})))"
    )
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    *_, last = done.stdout.splitlines()
    assert last == "['qmpballoon', 'qmpballoon.pytest_plugin']", done.stderr


def test_a_vm_of_ones_own_that_does_not_start_says_why(qemu_vm: StartQemuVm) -> None:
    with pytest.raises(LabError, match="unsupported machine type"):
        qemu_vm("qemu-system-x86_64", "-M", "no-such-machine")


def test_a_vm_takes_commands_and_signals(
    qemu_vm: StartQemuVm, balloon_connect: BalloonConnect, guest_image: image.GuestImage
) -> None:
    guest = qemu_vm(memory="160MiB", fresh=True)
    vm = balloon_connect(guest)
    assert vm.ready(timeout_s=60).size == 160 * MIB
    before = vm.state().held
    guest.command("hold 40")
    vm.wait_for(lambda state: (state.held or 0) > (before or 0) + 30 * MIB, timeout_s=60)
    assert "Linux version" in guest.console.read_text(errors="replace")
    guest.stop()
    os.waitid(os.P_PID, guest.pid, os.WSTOPPED | os.WNOWAIT)
    guest.cont()
    assert vm.state().run_state == "running"
    guest.terminate()
    assert not guest.socket.exists()


def test_a_vm_that_was_ended_says_so() -> None:
    with QemuVms() as vms:
        guest = vms.start("qemu-system-x86_64", "-m", "64M", "-nodefaults", "-S")
    with pytest.raises(LabError, match="does not run"):
        guest.actual()
    with pytest.raises(ProcessLookupError):
        os.kill(guest.pid, signal.SIGCONT)


def test_a_qemu_that_hangs_is_told_and_does_not_hold_up_the_end(qemu_vm: StartQemuVm) -> None:
    guest = qemu_vm()
    with qmpballoon.sync.connect(guest) as vm:
        vm.ready(timeout_s=60)
        guest.stop()
        with pytest.raises(qmpballoon.ConnectionLost, match="QEMU did not answer"):
            vm.state()
    with pytest.raises(qmpballoon.Unreachable, match="is stopped"):
        qmpballoon.sync.connect(guest, timeout_s=0.2).__enter__()
