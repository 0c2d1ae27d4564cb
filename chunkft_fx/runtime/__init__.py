"""Runtime: runs the programs of one capture as one autograd function. Internal."""
