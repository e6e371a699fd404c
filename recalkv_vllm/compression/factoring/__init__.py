"""Factors of all layers of a model, made layer after layer, and the refit of ``o_proj``."""
