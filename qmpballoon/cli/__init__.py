"""The command line: one file per verb, each with ``add_arguments(parser)`` and ``run(arguments) -> int``.

::

    program    the parser, the choice of the verb, the message and exit code of an error
    arguments  readers of typed values
    broker     the options of verbs that speak to a broker
    signals    what ends a verb as Ctrl-C does
    sockets    which monitors a typed path or glob names

A verb's module is imported only when the verb is used, so ``--help`` is fast.
The one-shot verbs are built on :mod:`qmpballoon.api`; a program can do the same with it.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: that of this process) and return its exit code."""
    try:
        from qmpballoon.cli import program  # so that Ctrl-C meanwhile prints no traceback
    except KeyboardInterrupt:
        return 130
    return program.main(argv)
