"""Module: what ``compile`` returns; it stands in for the model, and follows or refuses changes of it. Internal."""
