"""What a run tells: its log, and what a dry run shows. Internal."""
