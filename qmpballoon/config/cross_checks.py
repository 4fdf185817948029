"""Settings that are valid alone and invalid together. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qmpballoon.addresses import is_tcp, refused_address
from qmpballoon.config.tree import Configuration, MqttSettings, VmSettings
from qmpballoon.model.names import safe_name
from qmpballoon.readers import Path
from qmpballoon.units import Amount


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Keys that are invalid together; reported at the first of them that the file sets."""

    keys: tuple[Path, ...]
    reason: str


def contradictions(config: Configuration) -> Iterator[Contradiction]:
    """Yield all contradictions of a configuration whose single values are valid."""
    yield from _of_mqtt(config.mqtt)
    for pattern in config.discovery.sockets:
        refused = refused_address(pattern, allow_remote=config.discovery.allow_remote)
        if is_tcp(pattern) and refused is not None:
            yield Contradiction((("discovery", "sockets"), ("discovery", "allow_remote")), refused)
    listen = config.http.listen
    if listen is not None and not listen.is_local and not config.http.allow_remote:
        reason = (
            f"other machines can reach {listen}, and there is neither a password nor encryption: use "
            "127.0.0.1, or set allow_remote = true"
        )
        yield Contradiction((("http", "listen"), ("http", "allow_remote")), reason)
    vm_keys: dict[str, Path] = {key: ("vm", key) for pair in _PAIRS for key in pair}
    for low, high, reason in _disorder(config.vm):
        yield Contradiction((vm_keys[low], vm_keys[high]), reason)
    yield from _same_renames(config)
    setters = Counter(key for match in config.matches for key, _ in match.settings)
    for index, match in enumerate(config.matches):
        here = dict(match.settings)
        for low, high, reason in _disorder(replace(config.vm, **here)):
            own = [key for key in (low, high) if key in here]
            inherited = [key for key in (low, high) if key not in here]
            if own and not any(
                setters[key] for key in inherited
            ):  # another match may change an inherited key
                paths: list[Path] = [("vm", "match", index, key) for key in own]
                yield Contradiction((*paths, *(vm_keys[key] for key in inherited)), reason)


def _same_renames(config: Configuration) -> Iterator[Contradiction]:
    """Yield each match that gives a name which an earlier one gives: only one VM can have it."""
    first: dict[str, int] = {}
    for index, match in enumerate(config.matches):
        if match.rename is None:
            continue
        before = first.setdefault(safe_name(match.rename), index)
        if before != index:
            keys: tuple[Path, ...] = tuple(("vm", "match", each, "rename") for each in (index, before))
            reason = f"{match.rename} is the name that vm.match[{before}] gives: give each VM its own"
            yield Contradiction(keys, reason)


def _of_mqtt(mqtt: MqttSettings) -> Iterator[Contradiction]:
    if mqtt.username is not None and mqtt.password_file is None:
        yield Contradiction(
            (("mqtt", "username"), ("mqtt", "password_file")),
            "needs a password: set password_file, or pass the systemd credential mqtt-password "
            "($CREDENTIALS_DIRECTORY, which has none here)",
        )
    if mqtt.password_file is not None and mqtt.username is None:
        yield Contradiction((("mqtt", "password_file"), ("mqtt", "username")), "needs a username")
    if mqtt.key_file is not None and mqtt.cert_file is None:
        yield Contradiction((("mqtt", "key_file"), ("mqtt", "cert_file")), "needs a cert_file")
    if mqtt.url and not any(url.tls for url in mqtt.url):
        for key in ("ca_file", "cert_file"):
            if getattr(mqtt, key) is not None:
                reason = "means an encrypted connection, and no url is mqtts or wss"
                yield Contradiction((("mqtt", key),), reason)
    for response in mqtt.response_topics:
        if f"{response}/".startswith(f"{mqtt.base_topic}/"):
            reason = f"{response} is never honoured: below base_topic agents have their own topics"
            yield Contradiction((("mqtt", "response_topics"), ("mqtt", "base_topic")), reason)
        elif f"{response}/".startswith(f"{mqtt.discovery_prefix}/"):
            reason = f"{response} is never honoured: below discovery_prefix are Home Assistant's topics"
            yield Contradiction((("mqtt", "response_topics"), ("mqtt", "discovery_prefix")), reason)
    if f"{mqtt.discovery_prefix}/".startswith(f"{mqtt.base_topic}/"):
        reason = f"{mqtt.discovery_prefix} is base_topic or below it, where agents have their own topics"
        yield Contradiction((("mqtt", "discovery_prefix"), ("mqtt", "base_topic")), reason)
    if mqtt.home_assistant and mqtt.payload == "msgpack":
        reason = 'needs payload = "json": Home Assistant does not read msgpack'
        yield Contradiction((("mqtt", "home_assistant"), ("mqtt", "payload")), reason)
    if mqtt.min_interval_s > mqtt.heartbeat_s:
        reason = f"{mqtt.min_interval_s:g} s is more than heartbeat_s, {mqtt.heartbeat_s:g} s"
        yield Contradiction(
            (("mqtt", "min_interval_s"), ("mqtt", "heartbeat_s")), f"min_interval_s of {reason}"
        )


_PAIRS = (("floor", "ceiling"), ("fast_interval_s", "stats_interval_s"))


def _disorder(settings: VmSettings) -> Iterator[tuple[str, str, str]]:
    """Yield the pairs whose first value is above the second; a share and a size cannot be compared."""
    for low, high in _PAIRS:
        lower, upper = getattr(settings, low), getattr(settings, high)
        if isinstance(lower, Amount):
            above = lower.relative == upper.relative and lower.exceeds(upper)
        else:
            above = lower > upper
        if above:
            yield low, high, f"{low} {lower} is above {high} {upper}"
