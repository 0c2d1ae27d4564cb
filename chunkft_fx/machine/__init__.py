"""Machine: measures how fast a machine is, and holds torch's allocator to the budget. Internal."""
