"""Copies: weights, saved values and optimizer states move between host memory and the device here. Internal."""
