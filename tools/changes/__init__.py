"""``chunkft train``: what of a model is changed before it is trained. Internal."""
