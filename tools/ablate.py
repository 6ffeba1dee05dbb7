"""`sfp ablate`.

Example:
    python tools/ablate.py configs/cfg_mini.py --study modules
"""

import sys

from sfp.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
