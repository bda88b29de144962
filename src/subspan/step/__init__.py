"""One step of the optimizer, part by part; `plain.py` states it on bare tensors."""
