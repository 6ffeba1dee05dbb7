"""`sfp methods`.

Example:
    python tools/list.py --markdown     # the generated part of docs/methods.md
"""

import sys

from sfp.cli import main

if __name__ == "__main__":
    sys.exit(main(["methods", *sys.argv[1:]]))
