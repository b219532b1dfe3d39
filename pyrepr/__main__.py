"""``python -m pyrepr``: the command ``pyrepr``, where its script is not on the path."""

import sys

from pyrepr.cli import main

sys.exit(main())
