"""The model to compress: found, checked against what is supported, and loaded."""
