"""Healing: factors trained for minutes until the compressed model predicts as the dense one does.

Closed-form factors are best layer by layer, to second order. Knowledge distillation trains those of
all layers together, through the rounding of latents, with ``q_proj`` and ``o_proj`` where the base
model's weights may change. Nothing of it costs a cached byte or time in serving.
"""
