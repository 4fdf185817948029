"""Policies against each other on real guests: what is played, on what, and what it came to."""
