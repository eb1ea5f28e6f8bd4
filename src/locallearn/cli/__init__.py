"""The command line: subcommands, what they print, and exit codes.

Exit codes: 0 done; 2 the input was wrong (one line says what, on standard error); 130 and 143
stopped by SIGINT or SIGTERM, with everything saved.
"""

from locallearn.cli.main import main

__all__ = ["main"]
