"""Following: decides which changes of the model a compiled module follows, and refuses the others by name. Internal."""
