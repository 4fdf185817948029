"""These tests need a Home Assistant, which ``make test-ha`` installs; without it none is collected."""

import os

from real_fixtures import *  # noqa: F403

collect_ignore_glob = [] if os.environ.get("QMPBALLOON_HOME_ASSISTANT") else ["test_*.py"]
