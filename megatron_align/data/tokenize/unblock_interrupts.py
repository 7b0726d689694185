"""Imported last by the fork server of tokenising: lifts the mask it was started under (see ``workers``).

Without it, every process that the server forks later, for whatever purpose, would never receive Ctrl-C. The server
itself ignores it from here on.
"""

import signal

signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
