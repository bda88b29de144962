"""Checkpoints on disk, of one process or of many; usable without the training harness."""
