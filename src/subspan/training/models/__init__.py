"""The models of a run."""
