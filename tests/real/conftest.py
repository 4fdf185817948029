"""The fixtures are in real_fixtures, where a type checker finds them under a name of their own."""

from real_fixtures import *  # noqa: F403
