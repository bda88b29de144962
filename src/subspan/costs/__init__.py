"""Closed forms and counters of memory, traffic and work that planning, benchmarks and training share."""
