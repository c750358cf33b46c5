"""`python -m crystallm_kit.training RECIPE`: the loop alone, where pymatgen is not installed."""

import sys

from crystallm_kit.training.loop import main

if __name__ == "__main__":
    sys.exit(main())
