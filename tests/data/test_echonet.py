"""python -m data.echonet on a small tree of EchoNet-Dynamic's form, with real AVI files."""

import io
import json
import resource
import shlex
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.check.__main__ import main as check_main
from data.dataset import load_samples
from data.echonet.__main__ import main
from data.media.frames import VideoOptions
from data.media.patches import unpatchify
from data.media.video import open_video
from reward.extract import extract_number
from tests.conftest import ROOT
from tests.data.media.test_video import load_video, read_frames

HEAD = "FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split"
FPS = 50


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def write_avi(path: Path, frames: np.ndarray) -> None:
    """Write frames, (T, H, W) uint8, as Motion-JPEG, the codec of EchoNet-Dynamic's AVI files."""
    jpegs = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).convert("RGB").save(buffer, format="JPEG", quality=95)
        jpegs.append(buffer.getvalue())
    count, height, width = frames.shape
    largest = max(map(len, jpegs))
    main_header = struct.pack("<14I", 10**6 // FPS, 0, 0, 0x10, count, 0, 1, largest, width, height, 0, 0, 0, 0)
    stream = b"vidsMJPG" + struct.pack("<10I4H", 0, 0, 0, 1, FPS, 0, count, largest, 2**32 - 1, 0, 0, 0, width, height)
    bitmap = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    streams = chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", bitmap))
    movie, index = b"movi", b""
    for jpeg in jpegs:
        index += b"00dc" + struct.pack("<3I", 0x10, len(movie), len(jpeg))
        movie += chunk(b"00dc", jpeg)
    body = chunk(b"LIST", b"hdrl" + chunk(b"avih", main_header) + streams) + chunk(b"LIST", movie)
    path.write_bytes(chunk(b"RIFF", b"AVI " + body + chunk(b"idx1", index)))


def grey(number: int) -> np.ndarray:
    """Eight plain frames that grow brighter: (T, H, W)."""
    levels = 20 * np.arange(8) + 10 * number
    return np.broadcast_to(levels[:, None, None], (8, 112, 112)).astype(np.uint8)


ROWS = [
    "0X1A,55.3456,30.1,70.2,112,112,50,8,TRAIN",
    "0X1B,20,30,70,112,112,50,8,TRAIN",
    "0X2A,64.96,30,70,112,112,50,8,VAL",
    "0X3A.avi,33.3,30,70,112,112,50,8,test",
]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "EchoNet Dynamic"
    (root / "Videos").mkdir(parents=True)
    (root / "FileList.csv").write_text("\n".join([HEAD, *ROWS]) + "\n")
    for number, name in enumerate(("0X1A", "0X1B", "0X2A", "0X3A")):
        write_avi(root / "Videos" / f"{name}.avi", grey(number))
    return root


def samples_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_splits_become_files_whose_videos_and_answers_the_trainer_reads(root, tmp_path):
    output = tmp_path / "new" / "data"
    assert main(["--root", str(root), "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["test.json", "train.json", "val.json"]
    answers = {}
    for split in ("train", "val", "test"):
        for sample in load_samples([str(output / f"{split}.json")], str(root / "Videos")):
            answers[sample.id] = (split, sample.answer, extract_number(sample.answer))
            frames, sampled_fps = read_frames(sample.media[0].path, VideoOptions(nframes=8))
            number = ("0X1A", "0X1B", "0X2A", "0X3A").index(sample.id)
            expected = np.repeat(grey(number)[:, None], 3, axis=1)
            assert abs(frames.numpy().astype(int) - expected).max() <= 2  # JPEG
            assert sampled_fps == pytest.approx(FPS) and open_video(sample.media[0].path, VideoOptions())[1][-1] == 7
    assert answers == {
        "0X1A": ("train", "The ejection fraction is 55.3%.", 55.3),
        "0X1B": ("train", "The ejection fraction is 20.0%.", 20.0),
        "0X2A": ("val", "The ejection fraction is 65.0%.", 65.0),
        "0X3A": ("test", "The ejection fraction is 33.3%.", 33.3),
    }


def test_the_frames_reach_the_model_as_they_were_drawn(root, tmp_path):
    assert main(["--root", str(root), "--output", str(tmp_path / "out")]) == 0
    for number, sample in enumerate(load_samples([str(tmp_path / "out" / "train.json")], str(root / "Videos"))):
        loaded = load_video(sample.media[0].path, VideoOptions(nframes=4, resized_width=56, resized_height=56))
        frames = unpatchify(loaded.patches, loaded.grid_thw)
        expected = grey(number)[[0, 2, 5, 7], :56, :56][:, None]
        assert frames.shape == (4, 3, 56, 56) and abs(frames.numpy().astype(int) - expected).max() <= 2  # JPEG
        assert loaded.second_per_grid_t == pytest.approx(2 / (4 / 8 * FPS))  # 4 of 8 frames, 2 per step


def test_the_table_gives_least_mean_and_most_ejection_fraction(root, tmp_path, capsys):
    assert main(["--root", str(root), "--output", str(tmp_path / "out")]) == 0
    table = {words[0]: words[1:] for words in map(str.split, capsys.readouterr().out.splitlines()) if words}
    assert table["train"] == ["2", "0", "20.0", "37.7", "55.3"]


def test_missing_videos_are_named_and_counted(root, tmp_path, capsys):
    for name in ("0X1B", "0X3A"):
        (root / "Videos" / f"{name}.avi").unlink()
    assert main(["--root", str(root), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert [Path(line.strip("'")).name for line in printed.splitlines() if line.startswith("missing: ")] == [
        "0X1B.avi",
        "0X3A.avi",
    ]
    table = {words[0]: words[1:] for words in map(str.split, printed.splitlines()) if words}
    assert table["train"] == ["1", "1", "55.3", "55.3", "55.3"] and table["val"][:2] == ["1", "0"]
    assert table["test"] == ["0", "1", "no", "file", "is", "written"]
    assert [sample["id"] for sample in samples_of(tmp_path / "out" / "train.json")] == ["0X1A"]
    assert not (tmp_path / "out" / "test.json").exists()


def test_the_commands_it_names_are_the_right_ones(root, tmp_path, capsys):
    command = [sys.executable, "-m", "data.echonet", "--root", root, "--output", tmp_path / "my data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    check, train = done.stdout.splitlines()[-2:]
    assert f"--eval_data_path '{tmp_path}/my data/val.json'" in train
    python, dash_m, module, *flags = shlex.split(check)
    assert (python, dash_m, module) == ("python", "-m", "data.check") and check_main(flags) == 0
    assert "2 samples, 2 videos, 0 images: 2 valid samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (ROWS[1], ROWS[1].replace(",20,", ",much,"), "line 3: could not convert string to float: 'much'"),
        (ROWS[1], ROWS[1].replace(",20,", ",nan,"), "'0X1B' cannot have the Split 'TRAIN' and the EF nan"),
        (ROWS[1], ROWS[1].replace(",20,", ",,"), "line 3: could not convert string to float: ''"),
        (ROWS[1], ROWS[1].replace(",20,", ",100.5,"), "the EF 100.5"),
        (ROWS[1], "0X1B,20", "'0X1B' cannot have the Split ''"),
        (ROWS[1], ROWS[1].replace("TRAIN", "all\x1b[31m"), r"the Split 'all\x1b[31m'"),
        (ROWS[1], ROWS[0], "the FileName '0X1A' is no name of a file, or there twice"),
        (ROWS[1], ROWS[1].replace("0X1B", "../0X1B"), "the FileName '../0X1B' is no name"),
        (ROWS[1], ROWS[1].replace("0X1B", r"x\0X1B"), r"the FileName 'x\\0X1B' is no name"),
        (ROWS[1], ROWS[1].replace("0X1B", "B" * 200_000), "field larger than field limit"),
        (ROWS[1], ROWS[1].replace("0X1B", ""), "the FileName '' is no name"),
        ("EF,", "ef,", "line 2: 'EF': make it CSV in UTF-8 with FileName (a file in Videos/), EF (0"),
        (HEAD, "", "line 2: 'FileName': make it CSV"),
    ],
)
def test_a_bad_list_gets_one_line_and_nothing_is_written(root, tmp_path, capsys, old, new, words):
    path = root / "FileList.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert main(["--root", str(root), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m data.echonet: error: ") and words in line
    assert not (tmp_path / "out").exists()


def test_a_list_that_is_missing_or_no_text_gets_one_line(root, tmp_path, capsys):
    arguments = ["--root", str(root), "--output", str(tmp_path / "out")]
    (root / "FileList.csv").write_bytes(HEAD.encode() + b"\n\xff\xfe")
    assert main(arguments) == 2 and "can't decode byte 0xff" in capsys.readouterr().err
    (root / "FileList.csv").unlink()
    assert main(arguments) == 2 and "give the folder that holds it as --root" in capsys.readouterr().err


def test_a_folder_without_any_of_the_videos_is_named(root, tmp_path, capsys):
    (root / "Videos").rename(root / "videos")
    assert main(["--root", str(root), "--output", str(tmp_path / "out")]) == 2
    assert f"none of the 4 listed videos is in '{root}/Videos'" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_nothing_is_overwritten_not_even_a_file_of_an_empty_split(root, tmp_path, capsys, split):
    (root / "Videos" / "0X3A.avi").unlink()  # the only one of TEST
    output = tmp_path / "out"
    output.mkdir()
    (output / f"{split}.json").write_text("mine")
    assert main(["--root", str(root), "--output", str(output)]) == 2
    assert f"'{output}/{split}.json' exists" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in output.iterdir()} == {f"{split}.json": "mine"}


def test_a_second_run_refuses(root, tmp_path, capsys):
    arguments = ["--root", str(root), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0 and main(arguments) == 2
    assert "train.json' exists" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(root, tmp_path):
    command = [sys.executable, "-m", "data.echonet", "--root", root, "--output", tmp_path / "out"]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100, -1))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--output '{tmp_path}/out/train.json' cannot be written (File too large)" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("below", ["", "sub"])
def test_an_output_that_is_a_file_gets_one_line(root, tmp_path, capsys, below):
    (tmp_path / "out").write_text("mine")
    assert main(["--root", str(root), "--output", str(tmp_path / "out" / below)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line and (tmp_path / "out").read_text() == "mine"


def test_a_name_that_is_too_long_or_holds_control_characters_is_a_missing_video(root, tmp_path, capsys):
    path = root / "FileList.csv"
    path.write_text(path.read_text() + f"{'A' * 300},50,,,,,,,VAL\n" + '"x\x1b[31m\ny",50,,,,,,,VAL\n')
    assert main(["--root", str(root), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("missing: ") == 2 and printed.replace("\n", "").replace("…", "").isprintable()


def test_a_list_may_begin_with_a_byte_order_mark_and_hold_only_the_needed_columns(root, tmp_path):
    (root / "FileList.csv").write_text("\ufeffFileName,EF,Split\n0X1A,50,train\n", encoding="utf-8")
    assert main(["--root", str(root), "--output", str(tmp_path / "out")]) == 0
    assert [sample["id"] for sample in samples_of(tmp_path / "out" / "train.json")] == ["0X1A"]


def test_flags_are_checked(capsys):
    assert main(["--root", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--output" in line and "--help" in line
    assert main(["--root", "x", "--out", "y"]) == 2  # no abbreviations
    assert "cannot read" not in capsys.readouterr().err
