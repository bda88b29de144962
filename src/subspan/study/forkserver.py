"""Imported into the process that the runs of a study are forked from, and into nothing else.

Python lets that process ignore SIGINT, and not SIGTERM, which a scheduler may send to all processes at once. It must
outlive
the runs: without it nobody learns how they end.
"""

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
