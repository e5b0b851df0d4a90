"""The parts of the GRPO algorithm; `train.py` at the top level puts them together."""

import os

# How long OpenMP's threads spin before they sleep, in iterations. By default some 300,000, with which two runs on one
# machine mostly spin: two demos on 2 cores did 18 steps each in two minutes, where one alone takes 0.25 s a step. With
# this number they take 0.65 s a step, and a run alone is as fast as before (with OMP_WAIT_POLICY=passive: 0.4 s, but a
# run alone is a fifth slower or more).
# OpenMP reads the number when torch is imported, so `grpo` is imported before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
