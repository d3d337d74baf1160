"""python -m ppcoat <command>"""

import sys

from ppcoat.cli.main import main

sys.exit(main())
