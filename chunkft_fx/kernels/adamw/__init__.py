"""The AdamW kernels: Triton's and their reference in torch's operators, and the table that a launch walks over."""
