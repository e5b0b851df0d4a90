"""The parts of the GRPO algorithm; `train.py` at the top level puts them together."""
