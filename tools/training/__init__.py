"""``chunkft train``: data, the loop, and checkpoints of a run. Internal."""
