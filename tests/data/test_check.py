"""The check of a data set: what it finds, what it keeps, and that nothing but the cleaned file is written."""

import importlib.util
import json
import multiprocessing
import os
import re
import resource
import runpy
import signal
import sys
import time

import numpy as np
import pytest

from data.check.__main__ import PROBLEMS, check, main, parse
from data.check.media import PRELOAD, check_media, send_grid
from data.dataset import load_samples, write_entries
from data.media.frames import VideoOptions
from data.media.load import MediaOptions
from data.sample import BadMedia, InputError, Media
from grpo.demo.mp4 import write_mp4
from grpo.demo.tiny_tokenizer import build_tokenizer
from tests.conftest import OPTIONS, make_tiny
from tests.data.media.test_video import gray_clip

SMALL = "--nframes 4 --video_resized_width 56 --video_resized_height 56 --num_workers 2".split()


def entry(name, videos=("a.mp4",), answer="55%", question=None):
    question = "<video>\n" * len(videos) + "What is the EF?" if question is None else question
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "video": list(videos), "conversations": turns}


@pytest.fixture
def folder(tmp_path):
    """Good videos a and b, the short one c, the broken one d."""
    (tmp_path / "videos").mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)
    for name, num_frames in (("a", 8), ("b", 8), ("c", 3)):
        write_mp4(tmp_path / "videos" / f"{name}.mp4", frames[:num_frames], fps=8)
    (tmp_path / "videos" / "d.mp4").write_bytes(b"no video")
    return tmp_path


def run(folder, capsys, entries, *flags, name="train.json"):
    """Check entries: the exit code, what is printed, and {problem: (number, outcome, ids)}."""
    (folder / name).write_text(entries if isinstance(entries, str) else json.dumps(entries))
    code = main(["--data_path", f"{folder / name}", "--image_folder", f"{folder / 'videos'}", *SMALL, *flags])
    text = capsys.readouterr().out
    table = {}
    for problem in PROBLEMS:
        row = re.search(rf"^{re.escape(problem)} +(\d+) *(kept|left out)? *(.*)$", text, re.MULTILINE)
        table[problem] = (int(row[1]), row[2], row[3])
    return code, text, table


MIXED = [
    entry("fine", ["a.mp4", "b.mp4"]),
    3,
    entry("special", question="<video>\n<|im_end|>"),
    entry("turns") | {"conversations": []},
    entry("tags", question="<video><video>"),
    entry("fine", ["b.mp4"]),
    entry("gone\n\x1b[31m", ["x\n.mp4"]),
    entry("broken", ["a.mp4", "d.mp4", "gone.mp4"]),
    entry("short", ["c.mp4"]),
    entry("words", answer="normal") | {"extra": [1.5, "é\ud800"]},
    entry("many", ["a.mp4"] * 7),
]


def test_every_problem_is_counted_and_named(folder, capsys):
    code, text, table = run(folder, capsys, MIXED)
    assert code == 1
    assert table == {
        "malformed sample": (3, "left out", "#2, 'special', 'turns'"),
        "tags and files differ": (1, "left out", "'tags'"),
        "duplicate id": (1, "left out", "'fine'"),
        "missing file": (2, "left out", r"'gone\n\x1b[31m', 'broken'"),
        "undecodable video": (1, "left out", "'broken'"),
        "undecodable image": (0, None, ""),
        "too few frames": (1, "left out", "'short'"),
        "no number in the truth": (1, "kept", "'words'"),
        "two numbers in the truth": (0, None, ""),
        "negative truth": (0, None, ""),
        "over --max_videos": (1, "kept", "'many'"),
        "over --max_images": (0, None, ""),
    }
    assert re.search(r"^missing file.*\n    no video at '.*/videos/x\\n\.mp4'$", text, re.MULTILINE)
    assert re.search(r"^undecodable.*\n    '.*/videos/d\.mp4' is not a video that decord can open$", text, re.MULTILINE)
    assert re.search(r"^too few.*\n    '.*/c\.mp4' has 3 frames, --nframes 4 asks for 4$", text, re.MULTILINE)
    assert "11 samples, 6 videos, 0 images: 3 valid samples, 8 left out" in text
    assert text.replace("\n", "").isprintable()


def test_misspelt_keys_are_malformed_samples(folder, capsys):
    samples = [entry("fine"), entry("vidoe") | {"vidoe": "a.mp4"}, entry("conversation") | {"conversation": []}]
    samples += [entry("key") | {"images": "a.png"}, entry("tag", question="<video>\n<images>")]
    code, text, table = run(folder, capsys, samples)
    assert code == 1 and table["malformed sample"] == (4, "left out", "'vidoe', 'conversation', 'key', ...")
    assert re.search(r"\n    '.*/train\.json': sample 'vidoe': unknown key 'vidoe', did you mean 'video'\?\n", text)
    assert "5 samples, 1 videos, 0 images: 1 valid samples, 4 left out" in text


@pytest.mark.parametrize("width", [1, 2, 16, 72])
def test_a_narrow_video_is_checked_by_its_real_size(folder, capsys, width):
    write_mp4(folder / "videos" / "narrow.mp4", gray_clip(4, 56, width), fps=8)
    assert run(folder, capsys, [entry("narrow", ["narrow.mp4"])])[0] == 0
    write_mp4(folder / "videos" / "thread.mp4", gray_clip(4, 201 * width, width), fps=8)
    path, options = str(folder / "videos" / "thread.mp4"), MediaOptions(VideoOptions(nframes=4))
    reason = f"{path!r} has frames of {width}x{201 * width} pixels: one side is over 200 times the other"
    assert str(check_media(Media("video", path), options)) == reason


def test_more_than_three_ids_are_counted_not_listed(folder, capsys):
    _, _, table = run(folder, capsys, [entry(i, ["gone.mp4"]) for i in range(5)])
    assert table["missing file"] == (5, "left out", "'0', '1', '2', ...")


def test_samples_that_are_kept_do_not_make_the_check_fail(folder, capsys):
    code, _, table = run(folder, capsys, [MIXED[0], MIXED[-2], MIXED[-1]])
    assert code == 0
    assert sum(number for number, _, _ in table.values()) == 2
    assert run(folder, capsys, [MIXED[-1]], "--max_videos", "0")[2]["over --max_videos"][0] == 0


@pytest.mark.parametrize(("cap", "is_kept"), [("first", True), ("even", False), ("random", False)])
def test_a_bad_video_matters_where_the_cap_takes_it(folder, capsys, cap, is_kept):
    entries = [entry("bad", ["a.mp4", "b.mp4", "d.mp4"]), entry("fine", ["a.mp4"])]  # of three, the even choice is 0, 2
    code, _, table = run(folder, capsys, entries, "--max_videos", "2", "--video_cap", cap)
    assert code == int(not is_kept) and table["undecodable video"][0] == int(not is_kept)
    assert table["over --max_videos"] == (1, "kept", "'bad'")


def test_a_bad_video_beyond_the_cap_is_kept_since_the_trainer_does_not_open_it_but_misses_it(folder, capsys):
    entries = [entry("bad", ["a.mp4", "d.mp4"]), entry("gone", ["a.mp4", "gone.mp4"])]
    code, text, table = run(folder, capsys, entries, "--max_videos", "1", "--write_clean", str(folder / "clean.json"))
    assert code == 1 and table["undecodable video"][0] == 0 and table["missing file"] == (1, "left out", "'gone'")
    assert re.search(r"^    2 videos, only 1 are used; not used: '.*/d\.mp4' is not a", text, re.MULTILINE)
    assert [sample.id for sample in load_samples([str(folder / "clean.json")], str(folder / "videos"))] == ["bad"]


def test_entries_without_an_id_keep_the_one_that_their_position_gave_them(folder, capsys):
    unnamed = {key: value for key, value in entry("").items() if key != "id"}
    run(folder, capsys, [3, unnamed, entry("#1"), unnamed | {"id": None}], "--write_clean", str(folder / "clean.json"))
    samples = load_samples([str(folder / "clean.json")], str(folder / "videos"))
    assert [sample.id for sample in samples] == ["#2", "#1", "#4"]


def test_a_full_disk_leaves_no_half_of_a_cleaned_file(folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match=r"--write_clean .*clean\.json' cannot be written \(File too large\)"):
            write_entries([entry(f"s{i}") for i in range(99)], str(folder / "clean.json"), "write_clean")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (folder / "clean.json").exists()


@pytest.mark.parametrize("name", ["clean.json", "clean.jsonl"])
def test_the_cleaned_file_holds_the_valid_entries_unchanged_and_the_trainer_takes_it(folder, capsys, name):
    code, text, _ = run(folder, capsys, MIXED, "--write_clean", str(folder / name))
    assert code == 1 and str(folder / name) in text
    written = (folder / name).read_text()
    read = json.loads(written) if name == "clean.json" else [json.loads(line) for line in written.splitlines()]
    assert read == [MIXED[0], MIXED[-2], MIXED[-1]]
    samples = load_samples([str(folder / name)], str(folder / "videos"))
    assert [sample.id for sample in samples] == ["fine", "words", "many"]
    assert run(folder, capsys, read)[0] == 0


def test_nothing_is_overwritten_and_nothing_else_written(folder, capsys, monkeypatch):
    data = folder / "train.json"
    data.write_text(json.dumps(MIXED))
    (folder / "old.json").write_text("old")
    (folder / "link.json").symlink_to(folder / "nowhere.json")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    for path, message in (
        (data, "exists"),
        (folder / "old.json", "exists"),
        (folder / "link.json", "exists"),
        (folder / "videos", "exists"),
        (folder / "none" / "clean.json", "exists or cannot be written: name a new file"),
    ):
        assert main(["--data_path", str(data), *SMALL, "--write_clean", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m data.check: error: --write_clean ") and error.count("\n") == 1
        assert repr(str(path)) in error and message in error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    config = parse(["--data_path", str(data), "--image_folder", str(folder / "videos"), "--write_clean", "clean.json"])
    monkeypatch.chdir(folder)
    (folder / "clean.json").write_text("written meanwhile")
    with pytest.raises(InputError, match=r"--write_clean 'clean.json' cannot be written .File exists."):
        check(config)
    assert (folder / "clean.json").read_text() == "written meanwhile"
    (folder / "clean.json").unlink()
    run(folder, capsys, [entry("bad", ["d.mp4"])], "--write_clean", str(folder / "clean.json"))
    assert not (folder / "clean.json").exists()  # no sample is valid


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data_path"),
        (["--data_path", "x", "--nframe", "8"], "--nframe"),
        (["--data_path", "x", "--nframes", "eight"], "--nframes"),
        (
            ["--data_path", "x", "--nframes", "8", "--fps", "2"],
            "--nframes and --video_*: give fps or nframes, not both",
        ),
        (["--data_path", "x", "--video_resized_width", "56"], "together"),
        (["--data_path", "x", "--max_videos", "-1"], "--max_videos"),
        (["--data_path", "x", "--frame_cache", "y", "--frame_cache_gb", "inf"], "--frame_cache_gb inf"),
        (["--data_path", "x", "--max_prompt_length", "50"], "--model_id"),
        (["--data_path", "x", "--max_videos", "0", "--video_cap", "even"], "--video_cap even"),
        (["--data_path", "x", "--num_workers", "0"], "--num_workers"),
        (["--data_path", "gone.json"], "gone.json"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(flags, message, capsys):
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m data.check: error: ") and error.count("\n") == 1 and message in error


def test_a_file_that_is_no_json_is_one_line_and_exit_code_2(folder, capsys):
    (folder / "train.json").write_text("[{}, {")
    assert main(["--data_path", str(folder / "train.json")]) == 2
    assert "malformed JSON at line 1, column 7" in capsys.readouterr().err


def test_sizes_are_those_that_are_trained(tmp_path, capsys):
    tiny = make_tiny(tmp_path / "tiny", num_videos=(1, 3, 2, 1))
    flags = ["--data_path", str(tiny.folder / "data.json"), "--image_folder", str(tiny.folder / "videos"), *SMALL]
    assert main([*flags, "--model_id", str(tiny.folder / "model")]) == 0
    rows = dict(re.findall(r"^(\S.*?)  +(\d+ +\S+ +\S+ +\d+)$", capsys.readouterr().out, re.MULTILINE))
    lengths = sorted(len(prompt.prompt_ids) for prompt in tiny.prompts)
    assert rows["videos per sample"].split() == ["1", "1.5", "1.8", "3"]
    assert rows["frames read per video"].split() == ["4", "4.0", "4.0", "4"]
    median, mean = (lengths[1] + lengths[2]) / 2, sum(lengths) / 4
    assert rows["prompt tokens"].split() == [str(lengths[0]), f"{median:.1f}", f"{mean:.1f}", str(lengths[3])]
    system = ["--system_prompt", "You are a helpful assistant. What is the ejection fraction of this patient?"]
    assert main([*flags, "--model_id", str(tiny.folder / "model"), *system]) == 0
    longer = re.search(r"^prompt tokens +(\d+)", capsys.readouterr().out, re.MULTILINE)
    assert int(longer[1]) > lengths[0]  # the default system prompt is shorter
    limit = ["--max_prompt_length", str(lengths[-1] - 1)]
    assert main([*flags, "--model_id", str(tiny.folder / "model"), *limit]) == 0
    assert re.search(r"^over --max_prompt_length +1  's1'$", capsys.readouterr().out, re.MULTILINE)
    assert main([*flags, "--max_videos", "2"]) == 0
    tokens = re.search(
        r"^video and image tokens .*text not counted\) +(\d+) .* (\d+)$", capsys.readouterr().out, re.MULTILINE
    )
    assert tokens.groups() == ("8", "16")  # 2 x 2 x 2 per video, at most 2 videos


def test_a_model_without_a_usable_tokenizer_is_one_line_and_exit_code_2(folder, capsys, tmp_path):
    (folder / "train.json").write_text(json.dumps([entry("s1")]))
    flags = ["--data_path", str(folder / "train.json"), "--image_folder", str(folder / "videos"), *SMALL]
    tokenizer = build_tokenizer(["What is the EF?"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "tokenizer_config.json").write_text("[]")
    tokenizer.chat_template = "{% for message in messages %}{{ message.role + message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "text")
    for model_id in (tmp_path / "plain", tmp_path / "odd", tmp_path / "text", folder / "videos"):
        assert main([*flags, "--model_id", str(model_id)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"python -m data.check: error: --model_id {str(model_id)!r}")


def crash(sender, media, options):
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(sender, media, options):
    time.sleep(600)


def test_a_file_that_crashes_or_hangs_the_decoder_is_undecodable(folder):
    crashed = check_media(Media("video", "a\n.mp4"), OPTIONS, function=crash)
    assert isinstance(crashed, BadMedia) and str(crashed) == r"'a\n.mp4' crashes the decoder (exit code -11)"
    began = time.monotonic()
    hangs = check_media(Media("video", "a\n.mp4"), OPTIONS, timeout=0.2, function=hang)
    assert isinstance(hangs, BadMedia) and str(hangs) == r"'a\n.mp4' hangs the decoder: no frames within 0.2 s"
    assert time.monotonic() - began < 60
    assert check_media(Media("video", str(folder / "videos" / "a.mp4")), OPTIONS) == (2, 4, 4)


def test_the_check_prints_its_table_and_on_the_error_stream_a_bar_and_only_that(folder, capfd):
    (folder / "train.json").write_text(json.dumps(MIXED))
    where = ["--data_path", str(folder / "train.json"), "--image_folder", str(folder / "videos")]
    assert main([*where, *SMALL]) == 1
    printed = capfd.readouterr()
    assert printed.out.startswith("problem ") and printed.out.endswith("3 valid samples, 8 left out\n")
    lines = [line for line in printed.err.splitlines() if line]
    assert "6/6" in lines[-1] and all("s/file" in line or "file/s" in line for line in lines)


def test_the_process_of_a_file_keeps_the_words_of_ffmpeg_to_itself(folder, capfd):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    media = Media("video", str(folder / "videos" / "d.mp4"))
    process = multiprocessing.get_context("fork").Process(target=send_grid, args=(sender, media, OPTIONS))
    process.start()
    assert isinstance(receiver.recv(), BadMedia)
    process.join()
    assert capfd.readouterr().err == ""


def test_the_module_is_a_command_and_what_its_processes_begin_with_is_there(monkeypatch, capsys):
    assert all(importlib.util.find_spec(name) for name in PRELOAD)  # Python says nothing where one is not
    monkeypatch.setattr(sys, "argv", ["data.check", "--data_path", "gone.json"])
    monkeypatch.delitem(sys.modules, "data.check.__main__")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("data.check", run_name="__main__")
    multiprocessing.set_forkserver_preload(["train"])  # as in conftest.py
    assert caught.value.code == 2 and "cannot read 'gone.json'" in capsys.readouterr().err


def test_options_of_the_check_reach_the_decoder(folder, capsys):
    code, text, _ = run(folder, capsys, [entry("s1")], "--nframes", "6")
    assert code == 0 and re.search(r"^frames read per video +6 ", text, re.MULTILINE)
    with pytest.raises(InputError):
        parse(["--data_path", "x", "--video_min_pixels", "0"])


def test_rare_keys_truths_out_of_range_and_the_best_constant_are_shown(folder, capsys):
    entries = [entry(f"s{i}", answer=f"{answer}%") | {"site": i} for i, answer in enumerate((40, 50, 50, 120))]
    entries[1]["sight"] = 3
    code, text, _ = run(folder, capsys, entries)
    assert code == 0
    assert "key 'sight': only 1 of 4 samples have it ('s1')" in text and "key 'site'" not in text
    assert "1 truths, such as 120, are outside --valid_range 0 100" in text
    # Always 50: errors of 10, 0, 0 and 70; rewards of 0.1 + 0.9 · (11 / 36) · 7 / 6, 1, 1 and 0.1.
    reward = (0.1 + 0.9 * 11 / 36 * 7 / 6 + 1 + 1 + 0.1) / 4
    line = (
        f"zero skill: answering always 50 has a mean error of 20.00; the best mean reward of a constant is {reward:.3f}"
    )
    assert f"{line}, for 50" in text


def test_truths_that_may_be_read_otherwise_than_meant_are_named_and_kept(folder, capsys):
    answers = {
        "fine": "In the 2- and 4-chamber views the EF is 55%, EDV 120 ml",
        "volumes": "EDV 120 ml, ESV 54 ml, EF 55",
        "range": "50-55%",
        "hyphen": "EF: -55%",
        "both": "-5 or 5",
        "strain": "-18.5",
        "words": "normal",
    }
    code, text, table = run(folder, capsys, [entry(name, answer=answer) for name, answer in answers.items()])
    assert code == 0 and "7 valid samples, 0 left out" in text
    assert table["no number in the truth"] == (1, "kept", "'words'")
    assert table["two numbers in the truth"] == (3, "kept", "'volumes', 'range', 'both'")
    assert table["negative truth"] == (3, "kept", "'hyphen', 'both', 'strain'")
    assert "\n    'EDV 120 ml, ESV 54 ml, EF 55' is read as 120: leave only the answer, or" in text
    assert "\n    'EF: -55%' is read as -55: correct" in text


def test_the_check_knows_the_reward_functions_of_the_flags(folder, capsys):
    (folder / "mine.py").write_text(
        "def by_site(completions, assistant, site, half=1.0, **kwargs):\n    return [half * n for n in site]\n"
    )
    mine = ["--reward_funcs", f"{folder}/mine.py:by_site", "--reward_kwargs", '{"half": 0.5}']
    _, text, _ = run(folder, capsys, [entry("s0") | {"site": 3}, entry("s1") | {"site": 5}], *mine)
    assert "the best mean reward of a constant is 2.000" in text
    (folder / "train.json").write_text(json.dumps([entry("s0")]))
    where = ["--data_path", f"{folder}/train.json", "--image_folder", f"{folder}/videos", *SMALL]
    assert main([*where, *mine]) == 2
    assert "reward function by_site needs 'site', a key that no sample has" in capsys.readouterr().err
    assert main([*where, "--reward_funcs", "nothing"]) == 2
    assert "--reward_funcs 'nothing'" in capsys.readouterr().err
    assert main([*where, "--valid_range", "9", "3"]) == 2
    assert "--valid_range" in capsys.readouterr().err


def test_a_key_that_reward_functions_know_by_another_meaning_is_malformed(folder, capsys):
    _, text, table = run(folder, capsys, [entry("fine"), entry("taken") | {"completion_ids": [1]}])
    assert table["malformed sample"] == (1, "left out", "'taken'") and "key 'completion_ids'" in text
    assert "the best mean reward of a constant is 1.000" in text  # of the other one


def test_every_form_has_a_row_and_every_fault_of_an_image_a_line(mixed, tmp_path, capsys):
    entries = json.loads((mixed.folder / "data.json").read_text())
    (tmp_path / "cut.jpg").write_bytes((mixed.folder / "videos" / "b.jpg").read_bytes()[:200])
    entries.append(entries[4] | {"id": "cut", "image": f"{tmp_path}/cut.jpg"})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    where = ["--image_folder", str(mixed.folder / "videos"), "--model_id", str(mixed.folder / "model")]
    assert main(["--data_path", str(tmp_path / "data.json"), *where, *SMALL]) == 1
    text = capsys.readouterr().out
    rows = {
        "videos": 3,
        "images": 1,
        "images and videos": 1,
        "text only": 2,
        "frames in files": 2,
        "options of their own": 3,
    }
    assert all(re.search(rf"^{form} +{num}$", text, re.MULTILINE) for form, num in rows.items())
    assert re.search(
        r"^undecodable image +1  left out  'cut'\n    '.*cut\.jpg' is no image that Pillow can read", text, re.MULTILINE
    )
    lengths = [len(prompt.prompt_ids) for prompt in mixed.prompts]
    assert re.search(rf"^prompt tokens +{min(lengths)} .* {max(lengths)}$", text, re.MULTILINE)
    assert "8 samples, 4 videos, 4 images: 7 valid samples, 1 left out" in text


def test_the_check_fills_the_frame_cache(folder, capsys):
    cache = folder / "cache"
    for _ in range(2):
        assert run(folder, capsys, [MIXED[0]], "--frame_cache", str(cache))[0] == 0
    assert len(list(cache.glob("*.frames"))) == 2
    (folder / "file").write_text("x")
    where = ["--data_path", str(folder / "train.json"), "--image_folder", str(folder / "videos")]
    assert main([*where, *SMALL, "--frame_cache", str(folder / "file")]) == 2
    assert "--frame_cache" in capsys.readouterr().err
