"""Closed forms and counters of memory and traffic, which planning, benchmarks and training share."""
