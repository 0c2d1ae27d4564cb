"""Measurements: every number in docs/numbers.md comes from a command in here."""
