"""Comparison of policies on real guests: the script, its execution, and the figures."""
