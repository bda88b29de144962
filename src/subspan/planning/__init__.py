"""``subspan plan``: the memory of a training step, before anything is trained.

It runs the code of the step itself, on shapes without memory.
"""
