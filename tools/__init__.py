"""The command line: one program a file, each a subcommand of ``chunkft``."""
