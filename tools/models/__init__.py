"""The model of a run: its task, whether packed documents stay apart in it, and a chat with it. Internal."""
