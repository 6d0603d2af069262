"""``python -m yivl_edge`` is ``yivl-edge``."""

import sys

from yivl_edge.cli import main

sys.exit(main())
