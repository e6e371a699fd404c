"""Evaluation of base models and compressed checkpoints."""
