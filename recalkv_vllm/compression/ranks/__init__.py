"""Ranks and span widths of all layers within budgets of cache and of reconstruction."""
