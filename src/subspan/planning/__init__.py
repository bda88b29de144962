"""``subspan plan``: the memory of a training step, before anything is trained: the step's own code, run on shapes
alone.
"""
