"""The vLLM plugin: what it registers, the model it serves, and what it refuses before it starts."""
