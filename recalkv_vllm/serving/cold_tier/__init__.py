"""Latents outside GPU and host memory: entropy-coded files, as a tier of vLLM's offloading."""
