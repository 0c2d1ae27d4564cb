"""Optimizer states on the device: the stage, its batches of copies, the ring that pieces pass through. Internal."""
