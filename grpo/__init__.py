"""The parts of the GRPO algorithm; `train.py` at the top level puts them together."""

import os

# How long OpenMP's threads spin before they sleep, in iterations. By default some 300,000: two runs on one machine then
# take turns at spinning and are 30 times slower than one (demo, 2 cores: 7 s a step instead of 0.25 s; with this number
# 0.65 s, and one run alone loses 7 %). Read when torch is imported, so `grpo` is imported before it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
