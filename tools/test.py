"""`sfp eval`, under the path that launchers and scripts start.

Examples:
    python tools/test.py configs/cfg_mini.py
    torchrun --nproc_per_node=2 tools/test.py configs/cfg_ade20k.py --launcher pytorch
"""

import sys

from sfp.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
