"""What one region's calls are predicted to take: the kernels that a graph becomes, their bytes and their time."""
