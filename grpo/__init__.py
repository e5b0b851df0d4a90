"""The parts of the GRPO algorithm; `train.py` at the top level puts them together."""

import os

# How long OpenMP's threads spin before they sleep, in iterations; by default some 300,000. A longer time helps a
# process that has the cores to itself and hurts all others. Seconds per step of the `tiny` model on 2 cores, with
# 3,000, 10,000, 20,000: supervised, its data worker beside it, 0.10, 0.12, 0.11 to 0.13 (by default 0.12 to 0.14); GRPO
# without a data worker, alone 0.45, 0.40, 0.34; the same, two runs side by side, 0.95, 1.9, 2.3 each.
# OpenMP reads the number when torch is imported, so `grpo` is imported before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
