"""`python -m rlrnn` is `rlrnn`."""

import sys

from rlrnn.cli import main

sys.exit(main())
