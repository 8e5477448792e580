"""What a maintainer measures: ``python -m bench MODE``, run in a clone of the repository. See bench/README.md."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
_TESTS = str(ROOT / "python_tests")
# The catalogue of op calls (conformance.samples) and networks of other libraries (helpers) are the tests'.
if _TESTS not in sys.path:
    sys.path.append(_TESTS)
