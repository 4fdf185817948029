"""A running Home Assistant, steered over its REST API, and a browser that takes pictures of its pages."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from qmpballoon.lab.process import Program
from qmpballoon.lab.waiting import eventually

HOST: Final = "127.0.0.1"
PATIENCE_S: Final = 120.0  # for a start, which takes 6 s on an idle machine
WITHOUT_DEBUG: Final = ("env", "-u", "PYTHONASYNCIODEBUG")  # which logs what took long
_CALL_S: Final = 30.0

_CONFIGURATION: Final = """\
homeassistant:
  name: test
  time_zone: UTC
  unit_system: metric
http:
  server_host: {host}
  server_port: {port}
frontend:
config:
logger:
  default: warning
"""


class RunningHomeAssistant:
    """One Home Assistant with the MQTT integration; its configuration outlives its runs.

    ``python`` starts the Python that it is installed for. ``directory`` is below /tmp.
    """

    def __init__(self, python: str, directory: Path) -> None:
        self._python = python
        self._directory = directory / "home-assistant"
        self.log = directory / "home-assistant.log"
        self.url = f"http://{HOST}:{_free_port()}"
        self._program: Program | None = None
        self.tokens: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        storage = self._directory / ".storage"
        storage.mkdir(parents=True)
        port = urllib.parse.urlsplit(self.url).port
        (self._directory / "configuration.yaml").write_text(_CONFIGURATION.format(host=HOST, port=port))
        done = {"done": ["core_config", "analytics", "integration"]}  # those would use the network
        onboarding = {"version": 4, "minor_version": 1, "key": "onboarding", "data": done}
        (storage / "onboarding").write_text(json.dumps(onboarding))
        try:
            await self.start()
            await self._make_user()
        except BaseException:
            self.kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        print(self.log.read_text())  # shown with a test that failed

    async def start(self) -> None:
        """Start it, and wait until it runs."""
        arguments = ["-m", "homeassistant", "--config", str(self._directory), "--skip-pip", "--log-no-color"]
        self._program = Program([*WITHOUT_DEBUG, self._python, *arguments], log=self.log)
        await self.until(self._is_up, what="Home Assistant starts")

    async def stop(self) -> None:
        """End it as a service manager would."""
        assert self._program is not None
        self._program.signal(signal.SIGTERM)
        await self._program.ended(timeout_s=PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL, and reap."""
        if self._program is not None:
            self._program.destroy()

    def _is_up(self) -> bool:
        assert self._program is not None
        assert self._program.exit_status is None, self._program.failure("ended")
        try:
            if not self.tokens:
                return bool(self._call("GET", "/api/onboarding"))
            return bool(self._call("GET", "/api/config")["state"] == "RUNNING")
        except (OSError, urllib.error.HTTPError):
            return False

    async def _make_user(self) -> None:
        client_id = f"{self.url}/"
        user = {"name": "Ann", "username": "ann", "password": "secret", "language": "en"}
        code = (await self.call("POST", "/api/onboarding/users", {**user, "client_id": client_id}))[
            "auth_code"
        ]
        form = {"grant_type": "authorization_code", "code": code, "client_id": client_id}
        tokens = await self.call("POST", "/auth/token", urllib.parse.urlencode(form).encode())
        expires = int((time.time() + tokens["expires_in"]) * 1000)
        self.tokens = {**tokens, "hassUrl": self.url, "clientId": client_id, "expires": expires}

    async def connect(self, port: int) -> None:
        """Set up the MQTT integration as a person does on its page."""
        flow = await self.call("POST", "/api/config/config_entries/flow", {"handler": "mqtt"})
        broker: dict[str, object] = {"broker": HOST, "port": port}
        if any(field["name"] == "other_settings" for field in flow["data_schema"]):  # newer releases
            broker["other_settings"] = {"set_client_cert": False, "set_ca_cert": "off"}
        made = await self.call("POST", f"/api/config/config_entries/flow/{flow['flow_id']}", broker)
        assert made["type"] == "create_entry", made

    # ---- what it knows ----

    async def state(self, entity: str) -> str | None:
        """Return the state of an entity; None: there is no such entity."""
        return (await self.states()).get(entity, {}).get("state")

    async def states(self) -> dict[str, dict[str, Any]]:
        """Return all entities."""
        return {one["entity_id"]: one for one in await self.call("GET", "/api/states")}

    async def rendered(self, template: str) -> str:
        """Return what a template makes of what it knows."""
        return str(await self.call("POST", "/api/template", {"template": template}))

    async def act(self, action: str, entity: str, **data: object) -> None:
        """Perform an action such as ``number.set_value`` on an entity."""
        await self.call("POST", f"/api/services/{action.replace('.', '/')}", {"entity_id": entity, **data})

    async def until_state(self, entity: str, wanted: str, *, timeout_s: float = PATIENCE_S) -> None:
        """Wait until an entity has a state."""

        async def ask() -> str | None:
            return await self.state(entity)

        await eventually(
            ask, wanted.__eq__, timeout_s=timeout_s, what=f"{entity} is {wanted}", interval_s=0.1
        )

    async def until(self, probe: Callable[[], bool], *, what: str) -> None:
        """Wait until ``probe()``, which may block, is true."""

        async def ask() -> bool:
            return await asyncio.to_thread(probe)

        await eventually(ask, bool, timeout_s=PATIENCE_S, what=what, interval_s=0.1)

    def complaints(self) -> list[str]:
        """Return the warnings and errors in its log that concern MQTT.

        When a device has gone, Home Assistant clears the topic of that device itself, once for each entity,
        and then warns of its own messages.
        """
        return [
            line
            for line in self.log.read_text().splitlines()
            if (" WARNING " in line or " ERROR " in line)
            and ("mqtt" in line.lower() or "template" in line)
            and "No device components to cleanup" not in line
        ]

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """Make one call of the REST API, and return its answer from JSON, or as text."""
        return await asyncio.to_thread(self._call, method, path, body)

    def _call(self, method: str, path: str, body: object = None) -> Any:
        headers = {}
        if self.tokens:
            headers["Authorization"] = f"Bearer {self.tokens['access_token']}"
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if content is not None and not isinstance(body, bytes):
            headers["Content-Type"] = "application/json"
        return _http(method, f"{self.url}{path}", content, headers)


class Browser:
    """A Chromium without a window, driven through chromedriver."""

    def __init__(self, directory: Path, *, width: int, height: int) -> None:
        self._directory = directory
        self._size = f"{width},{height}"
        self._port = _free_port()
        self._program: Program | None = None
        self._session = ""

    async def __aenter__(self) -> Self:
        log = self._directory / "chromedriver.log"
        self._program = Program(["chromedriver", f"--port={self._port}"], log=log)
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={self._directory / 'browser'}",
            f"--window-size={self._size}",
        ]
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}}

        async def ask() -> Any:
            try:
                return (await self._call("POST", "/session", wanted))["sessionId"]
            except OSError:
                return None

        self._session = await eventually(ask, bool, timeout_s=PATIENCE_S, what="the browser starts")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._session:
                await self._call("DELETE", f"/session/{self._session}")
        finally:
            if self._program is not None:
                self._program.destroy()

    async def open(self, url: str) -> None:
        """Open a page."""
        await self._call("POST", f"/session/{self._session}/url", {"url": url})

    async def run(self, script: str, *arguments: object) -> Any:
        """Run a script in the page, and return what it returns."""
        body = {"script": script, "args": list(arguments)}
        return await self._call("POST", f"/session/{self._session}/execute/sync", body)

    async def picture(self) -> bytes:
        """Return the page as PNG."""
        return base64.b64decode(await self._call("GET", f"/session/{self._session}/screenshot"))

    async def _call(self, method: str, path: str, body: object = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        answer = await asyncio.to_thread(
            _http, method, f"http://{HOST}:{self._port}{path}", content, {"Content-Type": "application/json"}
        )
        return answer["value"]


def _http(method: str, url: str, content: bytes | None, headers: Mapping[str, str]) -> Any:
    request = urllib.request.Request(url, content, dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=_CALL_S) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        error.add_note(error.read().decode(errors="replace"))
        raise
    try:
        return json.loads(text)
    except ValueError:
        return text


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
