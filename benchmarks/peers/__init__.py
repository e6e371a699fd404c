"""Other ways to make a KV cache smaller, each in a file, measured as checkpoints are.

Written from their papers' formulas; a file names its source. ``__main__`` makes the table.
"""
