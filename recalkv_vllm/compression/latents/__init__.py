"""Latents as the cache stores them: the choice of a format, rotation, and rounding."""
