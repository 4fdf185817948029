"""The fixtures are in scenario_fixtures, where a type checker finds them under a name of their own."""

from scenario_fixtures import *  # noqa: F403
