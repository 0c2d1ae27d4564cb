"""What a run is asked to do: a file of options, the optimizer, the data. Internal."""
