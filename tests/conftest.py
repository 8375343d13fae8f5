"""Settings of the whole test suite."""

import os

# Tests compile hundreds of small models; measuring tiles would take most of their time.
os.environ.setdefault("SHOHIN_TUNE", "off")
