"""How `triptych train` ends, for shells and schedulers."""

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_NODE_FAULT = 71
"""A rank fell silent: a node is to blame, and another one may do (EX_OSERR of sysexits.h)."""
EXIT_RESUME = 75
"""The run saved itself and wants to be started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALLED = 128
"""A process that a signal ended has this exit code plus the signal's number."""
