"""Checkpoints of a training: one folder each, saved beside training, and read again. Internal."""
