"""Two programs that share a machine do not slow each other down by more than the share they take."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Many short parallel regions, each followed by a wait, as a training step of a small model has.
WORK = """
import os, time, grpo, torch
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # where they collide
torch.set_num_threads(2)
x, w = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)
for n in range(330):
    began = time.monotonic() if n == 30 else n and began
    torch.nn.functional.layer_norm(torch.nn.functional.silu(x @ w), (256,)).sum().backward()
print(time.monotonic() - began)
"""
UNSET = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}


def seconds_of(number: int) -> float:
    """Run the work in so many processes at once; return the seconds that the slowest took."""
    command = [sys.executable, "-c", WORK]
    running = [subprocess.Popen(command, cwd=ROOT, env=UNSET, stdout=subprocess.PIPE) for _ in range(number)]
    return max(float(process.communicate(timeout=60)[0]) for process in running)


def test_two_programs_side_by_side_take_only_a_few_times_as_long():
    """With threads that spin for as long as by default it is more than a hundred times."""
    assert seconds_of(2) < 10 * seconds_of(1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "3000 None"), ({"OMP_WAIT_POLICY": "active"}, "None active"), ({"GOMP_SPINCOUNT": "7"}, "7 None")],
)
def test_what_the_user_has_set_stays(given, expected):
    show = "import os, grpo; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    command = [sys.executable, "-c", show]
    shown = subprocess.run(command, cwd=ROOT, env=UNSET | given, capture_output=True, text=True).stdout
    assert shown.strip() == expected
