"""`python -m crystallm_kit`: the command, where its script is not on the path."""

import sys

from crystallm_kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
