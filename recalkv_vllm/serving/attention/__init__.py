"""Attention over latents as vLLM sees it: backend, metadata, implementation, layer."""
