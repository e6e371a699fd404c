"""Before an engine starts: what is checked, refused and announced."""
