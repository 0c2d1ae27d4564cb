"""Predict: says the bytes and the time of a step before it runs, from its graphs. Internal."""
