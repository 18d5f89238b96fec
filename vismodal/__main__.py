"""`python -m vismodal` is `vismodal`, also under torchrun and `accelerate launch -m`."""

import sys

from vismodal.cli import main

if __name__ == "__main__":
    sys.exit(main())
