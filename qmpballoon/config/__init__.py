"""The configuration: a TOML file, overridden by the command line, as one frozen, checked tree.

``tree`` has every table and key with its default, range and meaning. ``values`` checks single values,
``cross_checks`` several together. ``reader`` makes the tree from a text, ``toml_lines`` finds the lines
of its keys. ``printed`` makes the default file. ``matching`` returns the settings in force for one VM.
Only ``environment`` reads the environment and the file system; users are looked up in ``values``.
"""

from qmpballoon.config.environment import (
    MqttFiles,
    Surroundings,
    check_is_ours,
    read_mqtt_files,
    read_password,
    readable_by_all,
    refused_path,
    surroundings_from,
    surroundings_here,
    unusable_directory,
    unusable_files,
    user_name,
    writable_by_others,
)
from qmpballoon.config.matching import (
    Claim,
    reloaded,
    rename_for,
    restart_needed,
    right_to,
    vm_settings,
)
from qmpballoon.config.printed import default_text
from qmpballoon.config.reader import COMMAND_LINE, defaults, line_of, load, override, parse
from qmpballoon.config.tree import (
    CONTROL_NAME,
    AgentSettings,
    Budget,
    Configuration,
    DiscoverySettings,
    HostSettings,
    HttpSettings,
    MqttSettings,
    PolicySettings,
    VmMatch,
    VmSettings,
)
from qmpballoon.config.values import BrokerUrl, CgroupBudget, HttpAddress
from qmpballoon.model.records import MODES, POLICIES

__all__ = [
    "COMMAND_LINE",
    "CONTROL_NAME",
    "MODES",
    "POLICIES",
    "AgentSettings",
    "BrokerUrl",
    "Budget",
    "CgroupBudget",
    "Claim",
    "Configuration",
    "DiscoverySettings",
    "HostSettings",
    "HttpAddress",
    "HttpSettings",
    "MqttFiles",
    "MqttSettings",
    "PolicySettings",
    "Surroundings",
    "VmMatch",
    "VmSettings",
    "check_is_ours",
    "default_text",
    "defaults",
    "line_of",
    "load",
    "override",
    "parse",
    "read_mqtt_files",
    "read_password",
    "readable_by_all",
    "refused_path",
    "reloaded",
    "rename_for",
    "restart_needed",
    "right_to",
    "surroundings_from",
    "surroundings_here",
    "unusable_directory",
    "unusable_files",
    "user_name",
    "vm_settings",
    "writable_by_others",
]
