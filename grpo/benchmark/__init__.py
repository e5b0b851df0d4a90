"""`python -m grpo.benchmark`: what a step costs on this machine."""
