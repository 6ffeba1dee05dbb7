"""`sfp audit`.

Example:
    python tools/audit.py work/voc21 work/voc21_sclip
"""

import sys

from sfp.cli import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
