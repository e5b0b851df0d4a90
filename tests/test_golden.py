"""The numbers of a run's first steps, as they were: whoever changes the numerics sees it here.

    python -m tests.test_golden        writes them anew, where a change is meant; say so in the commit

The model's random weights come from a seed, so that no training lies in front of the first step, and five steps are too
few for the rounding of other kernels to grow: those for AVX2 differ by 2e-5 at most. The rewards are small: then the
constant in the advantage counts.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

import train
from tests.conftest import make_tiny
from tests.grpo.rewards import named
from tests.test_train import curves, flags

GOLDEN = Path(__file__).with_name("golden.json")
CURVES = """
    loss reward reward_std grad_norm entropy kl learning_rate clip_ratio/low_mean clip_ratio/high_mean
    completions/mean_length
""".split()
VERSIONS = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}  # without that of CUDA


def first_five_steps(tiny, output: Path) -> dict[str, list[float]]:
    more = "--max_steps 5 --global_batch_size 4 --num_iterations 2 --beta 0.1 --learning_rate 1e-3".split()
    more += ["--max_completion_length", "16", *named("by_length"), "--reward_weights", "0.02"]
    assert train.main(flags(tiny, output, *more)) == 0
    found = curves(output)
    return {name: found[name] for name in CURVES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the numbers are those of a CPU")
def test_the_first_five_steps_have_their_old_numbers(tiny, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    if golden["versions"] != VERSIONS:
        pytest.skip(f"the numbers are those of {golden['versions']}")
    found = first_five_steps(tiny, tmp_path / "out")
    for name, values in golden["curves"].items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = first_five_steps(make_tiny(Path(folder) / "tiny"), Path(folder) / "out")
    GOLDEN.write_text(json.dumps({"versions": VERSIONS, "curves": found}, indent=1) + "\n")
    print(f"{GOLDEN}: {found}")
