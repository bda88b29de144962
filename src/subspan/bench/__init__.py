"""Measurements of training steps: their memory, their traffic and their time."""
