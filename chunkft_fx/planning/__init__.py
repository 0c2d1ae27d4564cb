"""Planning: decides chunks, streamed weights, and saved and offloaded activations, under the budget. Internal."""
