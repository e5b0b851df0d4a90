"""A small Qwen2.5-VL of the real class, a real tokenizer, and samples with real mp4 files."""

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the project
sys.path.insert(0, str(ROOT))
# The models are tiny, and pytest's two workers share the cores. torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import grpo  # noqa: E402, F401  first of all, since it sets how torch's threads wait

# isort: split
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from PIL import Image  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, nothing waits for a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork

from data.dataset import load_samples  # noqa: E402
from data.loader import Prompt, load_prompt  # noqa: E402
from data.media.frames import VideoOptions  # noqa: E402
from data.media.load import MediaOptions  # noqa: E402
from grpo.demo.demo import CHAT_WORDS, build_model  # noqa: E402
from grpo.demo.mp4 import write_mp4  # noqa: E402
from grpo.demo.tiny_tokenizer import build_tokenizer  # noqa: E402
from grpo.model.load import SpecialTokens, special_tokens  # noqa: E402
from grpo.run.lock import lock_folder  # noqa: E402

OPTIONS = MediaOptions(VideoOptions(nframes=4, resized_width=56, resized_height=56))
FLAGS = "--nframes 4 --video_resized_width 56 --video_resized_height 56 --max_completion_length 6".split()


multiprocessing.set_forkserver_preload(["train"])  # ranks start from a process that has imported everything


@dataclass
class Tiny:
    """What most tests begin with."""

    folder: Path  # with model/, data.json and videos/
    model: torch.nn.Module
    tokenizer: object
    prompts: list[Prompt]
    tokens: SpecialTokens

    @property
    def suppress_tokens(self) -> torch.Tensor:
        return self.tokens.suppress_tokens


def make_tiny(folder: Path, num_videos=(1, 3, 2, 1), size=56) -> Tiny:
    """Write a sample per entry of `num_videos`, with noise for videos, and a random model with no zeros in it."""
    rng = np.random.default_rng(0)
    (folder / "videos").mkdir(parents=True)
    samples = []
    for i, count in enumerate(num_videos):
        videos = [f"{i}_{clip}.mp4" for clip in range(count)]
        for clip, video in enumerate(videos):
            # 1, 1.75 or 2.5 seconds between the grid's steps, so that a clip lasts longer than its grid is wide.
            frames = rng.integers(0, 256, size=(4 + 3 * (clip % 3), size, size, 3), dtype=np.uint8)
            write_mp4(folder / "videos" / video, frames, fps=2)
        question = "<video>\n" * count + "What is the ejection fraction" + " of this patient" * i + "?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"The ejection fraction is {40 + i}%."}]
        samples.append({"id": f"s{i}", "video": videos, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples))
    tokenizer = build_tokenizer(
        [CHAT_WORDS, "What is the ejection fraction of this patient?", "The ejection fraction is"]
    )
    model = build_model(tokenizer, seed=1, hidden_size=64, layers=2, blocks=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    loaded = load_samples([str(folder / "data.json")], str(folder / "videos"))
    prompts = [load_prompt(sample, tokenizer, 2, OPTIONS) for sample in loaded]
    return Tiny(folder, model, tokenizer, prompts, special_tokens(model, tokenizer, torch.device("cpu")))


def make_mixed(folder: Path) -> Tiny:
    """The same model; seven samples, in which every form occurs; the second and the fourth are text only."""
    tiny, rng = make_tiny(folder, num_videos=(2,)), np.random.default_rng(1)
    for name, size in (
        ("a.png", (56, 84)),
        ("b.jpg", (90, 70)),
        ("frames/1.png", (56, 56)),
        ("frames/2.png", (56, 56)),
    ):
        (folder / "videos" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / "videos" / name)
    own = {"video": "0_1.mp4", "nframes": 2, "video_start": 0.5, "resized_width": 84, "resized_height": 56}
    question, frames = "What is the ejection fraction", ["frames/1.png", "frames/2.png", "frames/1.png", "frames/2.png"]
    forms = [
        ("<image> and <video>, then <image>\n" + question, {"video": "0_0.mp4", "image": ["a.png", "b.jpg"]}),
        (question + "?", {}),
        (question, {"video": [frames, own]}),
        (question + " of this patient?", {}),
        (question, {"image": {"image": "b.jpg", "max_pixels": 6 * 28 * 28}}),
        (question, {"video": [{"video": "frames", "nframes": 2, "fps": 1}]}),
        (question + "?", {"video": "0_0.mp4"}),
    ]
    samples = []
    for i, (text, media) in enumerate(forms):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"The ejection fraction is {40 + i}%."}]
        samples.append({"id": f"s{i}", "conversations": turns} | media)
    (folder / "data.json").write_text(json.dumps(samples))
    loaded = load_samples([str(folder / "data.json")], str(folder / "videos"))
    prompts = [load_prompt(sample, tiny.tokenizer, 2, OPTIONS) for sample in loaded]
    return dataclasses.replace(tiny, prompts=prompts)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Tiny:
    return make_mixed(tmp_path_factory.mktemp("mixed") / "mixed")


STORES = []


def new_store() -> int:
    """Make a store in which the ranks of one process group find each other, as torchrun's agent does; return its port.

    It is kept to the end of the tests, and its port with it: a port that is only looked for may be another's once it
    is used.
    """
    STORES.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    return STORES[-1].port


def as_rank(rank: int, function, world_size: int, local_world_size: int, port: int, arguments: tuple) -> None:
    """Call a function in a new process as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local_world_size),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    function(*arguments)


def run_ranks(function, world_size: int, *arguments, local_world_size: int | None = None) -> None:
    """Call a module-level function in `world_size` new processes that find each other as under torchrun."""
    local = local_world_size or world_size
    arguments = (function, world_size, local, new_store(), arguments)
    mp.start_processes(as_rank, arguments, nprocs=world_size, start_method="forkserver")


def as_torchrun(function, world_size: int, arguments: tuple, log: str) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=world_size, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, function)(*arguments)


def start_torchrun(function, world_size: int, arguments: tuple, log: Path) -> multiprocessing.Process:
    """Start torchrun's agent in a process, with a module-level function in the place of a script for its ranks."""
    launcher = mp.get_context("forkserver").Process(target=as_torchrun, args=(function, world_size, arguments, log))
    launcher.start()
    return launcher


@pytest.fixture
def processes():
    """Processes that a test starts; they are killed at its end."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.join()


def lock_and_go_on(folder: str, times: int, said, then) -> None:
    for _ in range(times):
        lock_folder(folder)
    said.send("held")
    then(600)


def hold(folder: Path, processes: list, times: int = 1, then=time.sleep) -> multiprocessing.Process:
    """Lock a folder in another process, some times, which then goes on with `then`."""
    folder.mkdir(exist_ok=True)
    context = mp.get_context("forkserver")
    heard, said = context.Pipe(duplex=False)
    processes.append(context.Process(target=lock_and_go_on, args=(str(folder), times, said, then)))
    processes[-1].start()
    assert heard.recv() == "held"
    return processes[-1]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
