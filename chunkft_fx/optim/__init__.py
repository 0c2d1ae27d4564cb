"""Optimizers: update the slices of the active chunk, and keep the states of all others. Internal."""
