"""Graph: tools for FX graphs that passes and predictions share (storages, sizes, rewrites, operators). Internal."""
