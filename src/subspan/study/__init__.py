"""Studies: a grid of methods, settings and seeds, where each run is done once and rows are compared in pairs."""
