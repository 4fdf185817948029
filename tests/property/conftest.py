"""Hypothesis without its deadline: the duration of an example depends on the load of the machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("project", deadline=None)
settings.load_profile("project")
