"""`python -m locallearn`: the command line."""

import sys

from locallearn.cli import main

if __name__ == "__main__":
    sys.exit(main())
