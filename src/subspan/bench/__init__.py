"""Measurements: the memory and the time of whole training steps, side by side in one process."""
