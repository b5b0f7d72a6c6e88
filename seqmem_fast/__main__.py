"""Entry of ``python -m seqmem_fast``."""

import sys

from seqmem_fast.cli import main

sys.exit(main())
