"""The command line: one file per verb, each with ``add_arguments(parser)`` and ``run(arguments) -> int``.

::

    program    the parser, which verb runs, what an error becomes on stderr and as an exit code
    sockets    which monitors are meant by what was typed
    terminal   text, tables, colour and progress for a person

A verb's module is imported when that verb is asked for, so ``--help`` is quick whatever a verb needs.
The one-shot verbs stand on :mod:`qmpballoon.api`; what they do, a library user can do with it.
"""

from qmpballoon.cli.program import main

__all__ = ["main"]
