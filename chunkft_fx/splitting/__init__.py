"""Decides whether a batch may be split into micro-batches: a proof over the captured graphs, and what it asks for."""
