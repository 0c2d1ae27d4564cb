"""Head: computes projection and cross-entropy in blocks of logits, and predicts the memory of that. Internal."""
