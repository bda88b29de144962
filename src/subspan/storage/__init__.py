"""How the tensors of the optimizer's state are kept."""
