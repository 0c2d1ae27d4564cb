"""What a step that covers all parameters does, for people: its pieces in the program, and its time."""
