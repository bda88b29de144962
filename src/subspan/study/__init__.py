"""Many runs: a grid of methods, settings and seeds, run once each, compared with paired statistics."""
