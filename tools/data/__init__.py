"""``chunkft train``: what a run trains on, from files to batches of rows. Internal."""
