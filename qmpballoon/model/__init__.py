"""Frozen records and names that the parts of the program hand to one another."""
