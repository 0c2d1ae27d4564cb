"""Checkpoints of dense training with torch's AdamW: read, and written. Internal."""
