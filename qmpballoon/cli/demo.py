"""``demo``: a short demonstration with figures: real guests, a real broker and the agent."""

from __future__ import annotations

import argparse
import asyncio
from typing import Final

from qmpballoon import terminal
from qmpballoon.cli.arguments import seconds
from qmpballoon.cli.program import DONE, FAILED

EXAMPLES: Final = """\
examples:
  qmpballoon demo              two to three minutes; ends by itself
  qmpballoon demo --for 300    five minutes more, to try it

Five guests with changing needs share 62 % of what they could use: first the agent moves memory between
them, then each has an equal part, and the results are compared. A live picture in a terminal (NO_COLOR is
respected), otherwise line by line.

Needs QEMU and mosquitto, no KVM and no root. The guests are emulated and small. The first run downloads
a kernel (some 30 MB). All files are in a directory under /tmp, which is removed at the end, even after
Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--for",
        type=seconds,
        dest="stay_s",
        metavar="S",
        help="keep running this many seconds after the last step, to try commands",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    from qmpballoon.lab.demo.run import BrokerGone, run_demo  # imports MQTT: not for --help
    from qmpballoon.lab.require import LabError

    try:
        asyncio.run(run_demo(arguments.stay_s))
    except LabError as error:
        terminal.print_error(str(error))
        return FAILED
    except BrokerGone as error:
        terminal.print_error(terminal.clean(f"the demo's broker went away: {error}"))
        return FAILED
    return DONE
