"""Private names of libraries that are used: each is listed, and compared with the installed library."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import aiomqtt.client
import paho.mqtt.client
from qemu.qmp import QMPClient, protocol, qmp_client

from qmpballoon import mqtt, quick_ack
from qmpballoon.mqtt import connection
from qmpballoon.qmp import client, lean_client


def private_names(module: ModuleType) -> Iterator[str]:
    """Yield every name with one leading underscore that a module defines or uses as an attribute."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        name = ""
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name
        if name.startswith("_") and not name.startswith("__"):
            yield name


def as_installed(name: str) -> str:
    """Return a name of qemu.qmp, with its signature if it is a method, as its source has it."""
    method = getattr(QMPClient, name, None)
    if not callable(method):
        return name
    [defined] = ast.parse(dedent(inspect.getsource(method))).body
    assert isinstance(defined, ast.FunctionDef | ast.AsyncFunctionDef)
    returned = "" if defined.returns is None else f" -> {ast.unparse(defined.returns)}"
    return f"{name}({ast.unparse(defined.args)}){returned}"


def test_private_names_of_qemu_qmp_are_listed_and_unchanged() -> None:
    defined = {*private_names(protocol), *private_names(qmp_client)}
    used = defined & {*private_names(lean_client), *private_names(client)}
    assert {as_installed(name) for name in used} == set(lean_client.PRIVATE_NAMES)


def foreign_private_names(module: Path) -> Iterator[str]:
    """Yield every private attribute that a module uses of an object other than ``self``."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            of = ast.unparse(node.value)
            if of not in ("self", "super()"):
                yield f"{of}.{node.attr}"


def attributes_of_aiomqtt() -> Iterator[str]:
    """Yield the attributes that aiomqtt's client declares, with their types."""
    for node in ast.walk(ast.parse(inspect.getsource(aiomqtt.client))):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target).startswith("self._"):
            name = ast.unparse(node.target).removeprefix("self.")
            yield f"aiomqtt.Client.{name}: {ast.unparse(node.annotation)}"


def test_private_names_of_aiomqtt_and_paho_are_listed_and_unchanged() -> None:
    (directory,) = mqtt.__path__
    modules = [*Path(directory).glob("*.py"), Path(quick_ack.__file__)]
    used = {name for module in modules for name in foreign_private_names(module)}
    listed = {name.split("(")[0].split(":")[0] for name in connection.PRIVATE_NAMES}
    spelled = {
        "self._aiomqtt": "aiomqtt.Client",
        "aiomqtt_client": "aiomqtt.Client",
        "self._paho": "paho.Client",
        "paho": "paho.Client",
    }
    assert {f"{spelled[of]}.{name}" for of, _, name in (each.rpartition(".") for each in used)} == listed
    installed = set(attributes_of_aiomqtt())
    for name in listed:
        method = getattr(paho.mqtt.client.Client, name.removeprefix("paho.Client."), None)
        if method is not None:
            installed.add(f"{name}{inspect.signature(method)}")
    assert set(connection.PRIVATE_NAMES) <= installed
