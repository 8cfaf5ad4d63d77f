"""`python -m vlm` is the `vlm` command."""

import sys

from vlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
