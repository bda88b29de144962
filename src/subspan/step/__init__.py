"""The parts of one optimizer step; `plain.py` states the step on bare tensors."""
