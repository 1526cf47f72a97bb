"""``python -m tokenconv`` is the command ``tokenconv``."""

import sys

from tokenconv.cli import main

sys.exit(main())
