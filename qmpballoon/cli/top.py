"""``top``: every host and VM on a broker, or of this machine, live on the whole terminal."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qmpballoon.cli.broker import ABOUT, VARIABLE, add_broker_arguments, broker_access
from qmpballoon.cli.program import DONE, WRONG_USAGE
from qmpballoon.cli.vms import add_control_argument
from qmpballoon.cli.why_lines import lines_of
from qmpballoon.screen import can_draw
from qmpballoon.terminal import print_error

if TYPE_CHECKING:
    from qmpballoon.top.source import Source

EXAMPLES: Final = f"""\
examples:
  qmpballoon top --broker mqtt://localhost
  qmpballoon top --broker mqtts://broker --host 'edge-*'
  qmpballoon top --local                     this machine, without a broker

Keys: ? shows them. A target or a mode is set after a confirmation. It needs Textual:
the extra [top].

--local shows the VMs of the agents that run here, through their control sockets, and those at the default
sockets that no agent holds; it holds these monitors meanwhile.

{ABOUT}"""

_NO_TEXTUAL: Final = (
    f"top needs Textual, which is not installed: {sys.executable} -m pip install 'qmpballoon[top]'"
)
_NO_TERMINAL: Final = "top needs a terminal; for a program: qmpballoon ctl '*/*' get --json, or status --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--host", metavar="H", help="show this host alone; or a quoted glob")
    parser.add_argument("--local", action="store_true", help="show the VMs of this machine, without a broker")
    parser.add_argument(
        "--theme", choices=("dark", "light"), help="colours for this background (default: by $COLORFGBG)"
    )
    add_control_argument(parser, takes_sockets=False)
    add_broker_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    if importlib.util.find_spec("textual") is None:
        print_error(_NO_TEXTUAL)
        return WRONG_USAGE
    source = _source(arguments)
    if not (can_draw(sys.stdout) and sys.stdin.isatty()):
        print_error(_NO_TERMINAL)
        return WRONG_USAGE
    from qmpballoon.top.app import TopApp
    from qmpballoon.top.app import run as run_app
    from qmpballoon.top.columns import ASCII, BLOCKS
    from qmpballoon.top.picture import Wishes

    is_light = _has_light_background() if arguments.theme is None else arguments.theme == "light"
    glyphs = BLOCKS if "utf" in (sys.stdout.encoding or "").lower() else ASCII
    app = TopApp(source, explained, wishes=Wishes(host=arguments.host), light=is_light, glyphs=glyphs)
    ended_by = asyncio.run(run_app(app))
    return 128 + ended_by if ended_by else app.return_code or DONE


def explained(why: Mapping[str, object], width: int) -> Sequence[str]:
    """Return the lines of an answer to ``why``: what is in force, then the decisions, the newest first."""
    decisions = why.get("decisions")
    lines = list(
        lines_of({**why, "decisions": decisions[::-1]} if isinstance(decisions, list) else why, width)
    )
    now = next((at for at, line in enumerate(lines) if line.startswith("now ")), len(lines))
    return [lines[0], *lines[now:], *lines[1:now]]


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.local:
        from qmpballoon.cli.top_local import LocalSource

        return LocalSource(arguments.control)
    from qmpballoon.top.source import BrokerSource

    broker_access(arguments, fleet=True)  # what is wrong with the options is said before the screen is taken
    named = arguments.broker or os.environ.get(VARIABLE) or arguments.config
    name = named if isinstance(named, str) else ", ".join(named)
    return BrokerSource(name, lambda: broker_access(arguments, fleet=True).client)


def _has_light_background() -> bool:
    """Tell whether the terminal says so in COLORFGBG, as rxvt and Konsole set it: 7 or 15 is light."""
    return os.environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
