"""The fixtures are in contract_fixtures, where a type checker finds them under a name of their own."""

from contract_fixtures import *  # noqa: F403
