"""The storm's own modules by name, and the table of what was tried."""

import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)  # the tests here import the two modules beside them by name
