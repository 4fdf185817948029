"""Private names of libraries that are touched: each is listed, and where the library has it is checked."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import ModuleType

from qemu.qmp import QMPClient, protocol, qmp_client

from qmpballoon.qmp import client


def private_names(module: ModuleType) -> Iterator[str]:
    """Yield every name with one leading underscore that a module defines or touches as an attribute."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        name = ""
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name
        if name.startswith("_") and not name.startswith("__"):
            yield name


def as_installed(name: str) -> str:
    """Return a name as qemu.qmp has it: with its signature, if it is a method."""
    method = getattr(QMPClient, name, None)
    return f"{name}{inspect.signature(method)}" if callable(method) else name


def test_what_is_touched_of_qemu_qmp_is_listed_and_is_as_it_was() -> None:
    theirs = {*private_names(protocol), *private_names(qmp_client)}
    touched = theirs & set(private_names(client))
    assert {as_installed(name) for name in touched} == set(client.PRIVATE_NAMES)
