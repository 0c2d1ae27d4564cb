"""Passes over region graphs: each rewrites the joint graph of one region for what is demanded of it. Internal."""
