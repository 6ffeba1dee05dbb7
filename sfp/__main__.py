"""`python -m sfp`: the command `sfp`."""

import sys

from sfp.cli import main

if __name__ == "__main__":
    sys.exit(main())
