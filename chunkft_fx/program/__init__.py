"""Program: writes the calls of a step in order, and the graph of each region for what its chunk demands. Internal."""
