"""`sfp label`.

Example:
    python tools/label.py photos --out labelled --classes "cat, sofa|couch, floor, wall"
"""

import sys

from sfp.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
