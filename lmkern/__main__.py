"""`python -m lmkern`: the same as the `lmkern` command."""

import sys

from lmkern.cli import main

sys.exit(main())
