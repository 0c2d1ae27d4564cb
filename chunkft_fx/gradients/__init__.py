"""Gradients: what a parameter's ``.grad`` is after backward, and which slices are active. Internal."""
