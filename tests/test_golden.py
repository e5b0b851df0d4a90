"""The numbers of the demo's first five steps, as they were: whoever changes the numerics sees it here.

    python tests/test_golden.py        writes them anew, where a change is meant; say so in the commit

Two threads and the AVX2 instructions, which x86 machines have had for years, give other machines the same numbers.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden.json")
CURVES = ("loss", "reward", "grad_norm", "entropy", "completions/mean_length")
# Of OpenMP, PyTorch's own kernels, MKL and oneDNN.
SAME_EVERYWHERE = {
    "OMP_NUM_THREADS": "2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "CUDA_VISIBLE_DEVICES": "",
}


def versions() -> dict[str, str]:
    import torch
    import transformers

    torch_version = torch.__version__.split("+")[0]  # without that of CUDA
    return {"torch": torch_version, "transformers": transformers.__version__, "machine": platform.machine()}


def first_five_steps(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [sys.executable, "train.py", "--demo", "--max_steps", "5", "--output_dir", str(folder / "demo")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | SAME_EVERYWHERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(folder / "demo" / "tensorboard")).Reload()
    return {name: [point.value for point in events.Scalars(name)] for name in CURVES}


def test_the_demos_first_five_steps_have_their_old_numbers(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    if versions() != golden["versions"]:
        pytest.skip(f"the numbers are those of {golden['versions']}")
    found = first_five_steps(tmp_path)
    assert found.keys() == golden["curves"].keys()
    for name, values in found.items():
        assert values == pytest.approx(golden["curves"][name], rel=1e-5, abs=1e-6), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        curves = first_five_steps(Path(folder))
    GOLDEN.write_text(json.dumps({"versions": versions(), "curves": curves}, indent=1) + "\n")
    print(f"{GOLDEN}: {curves}")
