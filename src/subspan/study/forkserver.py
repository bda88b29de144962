"""Settings of the process that the runs of a study are forked from. Nothing else imports this module.

Python lets that process ignore SIGINT, but not SIGTERM, which a scheduler may send to all processes at once. The
process must outlive the runs: without it nobody learns how they end.
"""

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
