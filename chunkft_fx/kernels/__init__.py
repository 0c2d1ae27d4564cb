"""Triton kernels, each beside its eager reference: one launch for many slices, on device and pinned host memory.

Triton is imported when a kernel is first launched, so that the library works without it on the CPU.
"""
