"""`python -m softcfg`."""

import sys

from softcfg.cli.main import main

sys.exit(main())
