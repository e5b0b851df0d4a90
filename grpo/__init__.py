"""The parts of the GRPO algorithm; `train.py` at the top level puts them together."""

import os

# How long OpenMP's threads spin before they sleep, in iterations. By default some 300,000, with which two runs on one
# machine mostly spin: a step of the demo on 2 cores takes 7 s instead of 0.25 s. With this number it takes 0.65 s, and
# a run alone is as fast as before (with OMP_WAIT_POLICY=passive: 0.4 s, but a run alone is a fifth slower or more).
# OpenMP reads the number when torch is imported, so `grpo` is imported before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
