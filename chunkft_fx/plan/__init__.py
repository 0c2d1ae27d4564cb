"""Plan: the record of all decisions, its chunks and their cuts, and its table for people. Internal."""
