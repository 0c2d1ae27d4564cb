"""``chunkft convert``: what is done with saved checkpoints. Internal."""
