"""`python -m kron_hf` is `kron-hf`."""

import sys

from kron_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
