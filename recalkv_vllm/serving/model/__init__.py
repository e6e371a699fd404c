"""The served model: its classes, self-attention, and how weights reach it."""
