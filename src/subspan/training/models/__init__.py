"""The models that a run trains: presets, any other model, and LoRA on top of either."""
