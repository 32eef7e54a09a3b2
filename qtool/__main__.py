"""``python -m qtool``, which is also how ``torchrun`` starts it."""

import sys

from qtool.cli.app import main

sys.exit(main())
