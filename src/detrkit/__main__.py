"""`python -m detrkit` is the command `detrkit`."""

import sys

from detrkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
