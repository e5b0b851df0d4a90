"""The tests of `test_gpu.py` on a pretended GPU, so that they are known to run before a real one sees them.

Those that it marks `on_hardware` ask what the pretended one cannot know, and stay skipped.
"""

import pytest

from tests.pretend_cuda import pretended
from tests.test_gpu import *  # noqa: F403
from tests.test_gpu import SIZES


@pytest.fixture(scope="module", autouse=True)
def gpu():
    with pretended() as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "cpu", SIZES["tiny"])  # the same operators, on fewer numbers
        yield gpu


pytestmark = []  # in place of that of test_gpu.py, which skips all of them
