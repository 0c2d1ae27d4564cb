"""Optimizer states: where host memory keeps them, how they are staged, and their counts of updates. Internal."""
