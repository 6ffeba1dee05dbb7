"""`sfp compare`.

Example:
    python tools/compare.py configs/cfg_voc21.py --methods clip sclip sfp --work-dir work/three
"""

import sys

from sfp.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
