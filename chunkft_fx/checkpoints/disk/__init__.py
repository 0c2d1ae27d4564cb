"""What checkpoints are on the disk: folders, files of tensors, and checksums. Internal."""
