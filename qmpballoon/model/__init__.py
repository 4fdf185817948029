"""Frozen records and names that all parts of the program share."""
