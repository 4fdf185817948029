"""The command line: one file per verb, each with ``add_arguments(parser)`` and ``run(arguments) -> int``.

::

    program    the parser, the choice of the verb, the message and exit code of an error
    arguments  readers of typed values
    broker     the options of verbs that speak to a broker
    sockets    which monitors a typed path or glob names

A verb's module is imported only when the verb is used, so ``--help`` is fast.
The one-shot verbs are built on :mod:`qmpballoon.api`; a program can do the same with it.
"""

from qmpballoon.cli.program import main

__all__ = ["main"]
