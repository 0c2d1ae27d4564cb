"""Any class of torch optimizer over slices: run by itself, on states that wait in host memory between its steps."""
