"""``python -m qmpballoon.sim.qemu PATH …``: simulated QEMUs in separate processes.

Prints ``ready`` once every socket listens, and ends on SIGTERM or when all QEMUs have quit. An agent assigns
all sockets of one process to one VM, so ``--fork`` gives each QEMU its own process. These processes share the
memory of the imported modules, and end with their parent. ``--fleet`` gives each QEMU only a pid of its own
and serves all in one process, for hundreds of them; it takes commands from stdin (see `fleet`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.sim.qemu.fleet import Meter, MeteredQemu, event_loop, obey
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.process import listen_in_children
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import parse_size


class _Settings(TypedDict):
    guest: GuestSpec
    machine: MachineSpec
    faults: Faults
    booted: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        Faults.parse(options.fault)
    except ValueError as error:
        parser.error(str(error))
    if options.count < 1:
        parser.error("--count starts at 1")
    if options.fork:
        return _fork(options)
    if options.fleet:
        return _serve_fleet(options)
    asyncio.run(_serve([_qemu(options, number) for number in range(options.count)], options, _print_ready))
    return 0


def numbered(path: Path, number: int, count: int) -> Path:
    """Return the path of one of several QEMUs: ``vm.qmp`` becomes ``vm-0.qmp``, ``vm-1.qmp`` …"""
    return path if count == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qmpballoon.sim.qemu", description="Simulated QEMUs with a balloon."
    )
    parser.add_argument("path", type=Path, help="the QMP socket; with --count a number is added")
    parser.add_argument("--count", type=int, default=1, help="how many QEMUs (1)")
    processes = parser.add_mutually_exclusive_group()
    processes.add_argument("--fork", action="store_true", help="a process for each QEMU")
    processes.add_argument("--fleet", action="store_true", help="a pid for each QEMU, one process serves all")
    parser.add_argument("--control", action="store_true", help="a second monitor for each, at PATH.control")
    parser.add_argument("--size", type=parse_size, default="256MiB", help="memory of a guest (256MiB)")
    parser.add_argument("--anonymous", type=parse_size, default=None, help="memory its workload holds")
    parser.add_argument("--name", help="QEMU's -name; with --count a number is appended")
    parser.add_argument("--boot-s", type=float, help="seconds until the driver loads (default: it is up)")
    parser.add_argument("--no-balloon", action="store_true", help="no balloon device")
    parser.add_argument("--deflate-on-oom", action="store_true", help="negotiated")
    parser.add_argument("--behaviour", type=Behaviour, default=Behaviour.IDEAL, help=" ".join(Behaviour))
    parser.add_argument(
        "--fault", action="append", default=[], metavar="NAME[=VALUE]", help="may be repeated"
    )
    return parser


def _monitors(options: argparse.Namespace, number: int) -> list[Path]:
    path = numbered(options.path, number, options.count)
    return [path, Path(f"{path}.control")] if options.control else [path]


def _settings(options: argparse.Namespace, number: int) -> _Settings:
    name = options.name
    if name is not None and options.count > 1:
        name = f"{name}-{number}"
    return {
        "guest": GuestSpec(
            size=options.size,
            behaviour=options.behaviour,
            deflate_on_oom=options.deflate_on_oom,
            boot_s=GuestSpec().boot_s if options.boot_s is None else options.boot_s,
        ),
        "machine": MachineSpec(name=name, device=None if options.no_balloon else "virtio-balloon-pci"),
        "faults": Faults.parse(options.fault),
        "booted": options.boot_s is None,
    }


def _qemu(options: argparse.Namespace, number: int) -> SimulatedQemu:
    return SimulatedQemu(*_monitors(options, number), **_settings(options, number))


async def _serve(
    qemus: Sequence[SimulatedQemu], options: argparse.Namespace, ready: Callable[[], None]
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for qemu in qemus:
            await stack.enter_async_context(qemu)
            if options.anonymous is not None:
                qemu.set_demand(options.anonymous)
        loop = asyncio.get_running_loop()

        def terminate() -> None:
            for qemu in qemus:
                qemu.terminate()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, terminate)
        ready()
        for qemu in qemus:
            await qemu.exited.wait()


def _serve_fleet(options: argparse.Namespace) -> int:
    monitors = [_monitors(options, number) for number in range(options.count)]
    listeners = listen_in_children(monitors, options.size)
    meter = Meter()
    qemus = [
        MeteredQemu(*monitors[number], meter=meter, listeners=each, **_settings(options, number))
        for number, each in enumerate(listeners)
    ]

    def ready() -> None:
        obey(meter, _print)
        _print_ready()

    with asyncio.Runner(loop_factory=event_loop) as runner:
        runner.run(_serve(qemus, options, ready))
    return 0


def _print_ready() -> None:
    _print("ready\n")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _fork(options: argparse.Namespace) -> int:
    ready_reader, ready_writer = os.pipe()
    parent_reader, parent_writer = os.pipe()  # closed when the parent ends; the children detect that
    gc.freeze()  # the garbage collector does not write to shared pages, which would copy them
    children: set[int] = set()

    def forward(number: int, _: object) -> None:
        for child in tuple(children):
            with contextlib.suppress(ProcessLookupError):  # reaped, and not yet removed from the set
                os.kill(child, number)

    # A signal that comes while children are being forked must reach all of them.
    blocked = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    for number in range(options.count):
        child = os.fork()
        if child == 0:
            os.close(parent_writer)
            os.close(ready_reader)
            _run_child(options, number, ready_writer, parent_reader)
        children.add(child)
    for wanted in blocked:
        signal.signal(wanted, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    os.close(ready_writer)
    os.close(parent_reader)
    ready_count = 0
    while ready_count < options.count and (received := os.read(ready_reader, options.count)):
        ready_count += len(received)
    if ready_count == options.count:
        _print_ready()
    while children:
        child, _ = os.wait()
        children.discard(child)
    for number in range(options.count):
        path = numbered(options.path, number, options.count)
        path.unlink(missing_ok=True)  # of those that were killed
        Path(f"{path}.control").unlink(missing_ok=True)
    return 0 if ready_count == options.count else 1


def _run_child(options: argparse.Namespace, number: int, ready_writer: int, parent_reader: int) -> None:
    def ready() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        asyncio.get_running_loop().add_reader(parent_reader, os.kill, os.getpid(), signal.SIGTERM)
        os.write(ready_writer, b".")
        os.close(ready_writer)

    asyncio.run(_serve([_qemu(options, number)], options, ready))
    os._exit(0)
