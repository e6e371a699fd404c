"""The compressed checkpoint on disk: written, described, and read back."""
