"""What a run measures and shows while it goes on."""
