"""Trainers: puts a compiled model and its optimizer into the trainers of transformers and TRL. Needs transformers."""
