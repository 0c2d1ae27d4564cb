"""One file an optimizer: its spec, its options and its update. Internal; `chunkft_fx` exports the optimizers."""
