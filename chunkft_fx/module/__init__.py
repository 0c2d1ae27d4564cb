"""Module: what ``compile`` returns, which runs in the model's place, and the training behind it. Internal."""
