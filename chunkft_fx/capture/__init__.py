"""Capture: runs torch's tracers on a model, and makes regions and templates of its joint graph. Internal."""
