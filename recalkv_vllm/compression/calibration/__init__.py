"""Calibration text, a pass of it through the model, and the statistics that the pass sums up."""
