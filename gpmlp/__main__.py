"""`python -m gpmlp` is the command `gpmlp`."""

import sys

from gpmlp.cli import main

if __name__ == "__main__":
    sys.exit(main())
