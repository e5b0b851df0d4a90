import json
import math
import os
import re
import tracemalloc
from unicodedata import normalize

import pytest

from data.dataset import Entries, Samples, load_samples
from data.epochs import BatchItem
from data.loader import PromptDataset, PromptOptions
from data.sample import DuplicateId, InputError, Media, Sample
from tests.conftest import OPTIONS

HUMAN = {"from": "human", "value": "What is the EF?"}
GPT = {"from": "gpt", "value": "55%"}

LAST_TWO = "the last two turns must be the question, from 'human', and the answer, from 'gpt'"


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def entry(**changes):
    return {"id": "s1", "video": ["a.mp4", "b.mp4"], "conversations": [HUMAN, GPT]} | changes


def write(folder, content, name="train.json"):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def error_of(folder, content, name="train.json", **kwargs):
    path = write(folder, content, name)
    with pytest.raises(InputError) as caught:
        load_samples([path], **({"image_folder": str(folder)} | kwargs))
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and line.isprintable()
    assert repr(path) in line
    return line


def test_a_sample_holds_its_videos_prompt_and_answer(folder):
    turns = [
        {"from": "system", "value": "You read echos."},
        {"from": "human", "value": "<video>\nWhich view?"},
        {"from": "gpt", "value": "Apical."},
        {"from": "user", "value": "And <video> the EF?"},
        {"from": "assistant", "value": "The EF is 55%"},
    ]
    (sample,) = load_samples([write(folder, [entry(conversations=turns)])], str(folder))
    assert sample == Sample(
        id="s1",
        media=(Media("video", str(folder / "a.mp4")), Media("video", str(folder / "b.mp4"))),
        turns=(
            ("system", "You read echos."),
            ("user", "<video>\nWhich view?"),
            ("assistant", "Apical."),
            ("user", "And <video> the EF?"),
        ),
        answer="The EF is 55%",
    )


def test_videos_come_before_the_first_question_when_there_are_no_tags(folder):
    turns = [{"from": "system", "value": "S"}, HUMAN, GPT, {"from": "human", "value": "Sure?"}, GPT]
    (sample,) = load_samples([write(folder, [entry(conversations=turns)])], str(folder))
    assert sample.turns == (
        ("system", "S"),
        ("user", "<video>\n<video>\nWhat is the EF?"),
        ("assistant", "55%"),
        ("user", "Sure?"),
    )


def test_one_video_may_be_a_plain_string(folder):
    (sample,) = load_samples([write(folder, [entry(video="a.mp4")])], str(folder))
    assert sample.media == (Media("video", str(folder / "a.mp4")),)


def test_a_path_that_exists_is_used_as_it_is(folder, monkeypatch):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("a.mp4", "c.mp4"):
        (elsewhere / name).touch()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "b.mp4").mkdir()  # a folder of that name is no video
    videos = ["a.mp4", "b.mp4", str(folder / "c.mp4")]
    (sample,) = load_samples([write(folder, [entry(video=videos)])], str(folder))
    assert [media.path for media in sample.media] == ["a.mp4", str(folder / "b.mp4"), str(folder / "c.mp4")]


@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_in_the_other_unicode_form_is_found(folder, monkeypatch, on_disk, written):
    disk, name = folder / normalize(on_disk, "Écho"), normalize(on_disk, "vidéo_ü")
    for frames in (disk / name, folder / "ascii" / name):
        frames.mkdir(parents=True)
        (frames / f"{name}.png").touch()
        frames.with_suffix(".mp4").touch()
    name, gone = normalize(written, "vidéo_ü"), normalize(written, "é/gone.mp4")
    videos = [f"{name}.mp4", {"video": name}, [f"{name}/{name}.png"], gone]

    def files_of(image_folder, videos):
        (sample,) = Samples([write(folder, [entry(video=videos, image=[f"{name}/{name}.png"])])], image_folder)
        return [path for media in sample.media for path in media.files], sample.missing()

    for image_folder in (str(folder / "ascii"), str(disk), normalize(written, str(disk))):
        found, missing = files_of(image_folder, videos)
        assert missing == [os.path.join(image_folder, gone)]  # as it is written
        assert all(normalize(on_disk, path) == path for path in found if path not in missing)
    monkeypatch.chdir(disk)
    assert files_of("", videos[:3])[1] == files_of("gone", videos[:3])[1] == []
    assert files_of("", [str(folder / normalize(written, "Écho") / f"{name}.mp4")])[1] == []


def test_what_exists_in_both_unicode_forms_is_used_as_it_is_written(folder, monkeypatch):
    nfc, nfd = normalize("NFC", "é"), normalize("NFD", "é")
    for name in (nfc, nfd):
        (folder / name / "cwd").mkdir(parents=True)
        (folder / name / "a.mp4").touch()
    (folder / nfd / f"{nfc}.mp4").touch()
    (folder / nfd / "cwd" / f"{nfd}.mp4").touch()
    monkeypatch.chdir(folder / nfd / "cwd")
    videos = [f"{nfc}/a.mp4", f"{nfd}/a.mp4", f"{nfd}/{nfd}.mp4"]
    (sample,) = load_samples([write(folder, [entry(video=videos)])], str(folder))
    expected = [folder / nfc / "a.mp4", folder / nfd / "a.mp4", folder / nfd / f"{nfc}.mp4"]
    assert [media.path for media in sample.media] == [str(path) for path in expected]
    (sample,) = load_samples([write(folder, [entry(video=[f"{nfc}.mp4"])])], str(folder / nfd))
    assert sample.media[0].path == str(folder / nfd / f"{nfc}.mp4")  # not that of the working folder


def test_ids_are_strings_and_a_missing_one_is_the_position(folder):
    entries = [entry(id="x"), entry(id=7), entry(id=None), entry()]
    del entries[3]["id"]
    assert [sample.id for sample in load_samples([write(folder, entries)], str(folder))] == ["x", "7", "#3", "#4"]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_jsonl_is_read_by_its_name_or_by_its_content(folder, name):
    text = f"{json.dumps(entry())}\r\n\n{json.dumps(entry(id='s2'))}\n"
    assert [sample.id for sample in load_samples([write(folder, text, name)], str(folder))] == ["s1", "s2"]


def test_a_jsonl_line_may_hold_unicode_line_separators(folder):
    turns = [{"from": "human", "value": "a\u2028b"}, GPT]
    text = json.dumps(entry(conversations=turns), ensure_ascii=False)
    (sample,) = load_samples([write(folder, text.encode(), "train.jsonl")], str(folder))
    assert sample.turns == (("user", "<video>\n<video>\na\u2028b"),)


def test_a_list_is_read_whatever_the_name_and_with_a_byte_order_mark(folder):
    content = b"\xef\xbb\xbf" + json.dumps([entry()], indent=2).encode()
    assert load_samples([write(folder, content, "train.jsonl")], str(folder))[0].id == "s1"


def test_a_file_that_is_not_there_or_is_a_folder_or_a_pipe_is_named(folder):
    os.mkfifo(folder / "pipe")
    for path, problem in (
        (folder / "none.json", "No such file"),
        (folder, "is no ordinary file"),
        (folder / "pipe", "is no ordinary file"),
    ):
        with pytest.raises(InputError) as caught:
            load_samples([str(path)])
        assert all(part in str(caught.value) for part in (repr(str(path)), problem))


def test_malformed_json_is_named_with_line_and_column(folder):
    assert "line 2, column 4" in error_of(folder, '[\n{} {}]')  # fmt: skip
    assert "line 3, column 6" in error_of(folder, json.dumps(entry()) + '\n\n{"a" 1}', "train.jsonl")
    assert "line 1, column 10" in error_of(folder, '[{"id": 1')  # cut off
    assert "line 1, column 11" in error_of(folder, '[{"id": 1,}]')
    assert "line 1, column 10 (Invalid" in error_of(folder, '[{"id": "\x00\x1b"}]')
    assert "line 1, column" in error_of(folder, f'{{"id": 1,\n{json.dumps(entry())}', "train.jsonl")


def test_every_wrong_line_is_named_by_its_number(folder):
    text = json.dumps(entry()) + "\n\n" + "\n".join(["{'id': 1}", json.dumps(entry(id="s2")), "", "{]"])
    samples = Samples([write(folder, text, "train.jsonl")], str(folder))
    errors = [str(sample) for _, _, sample in samples.each() if isinstance(sample, InputError)]
    assert [re.search(r"line (\d+), column (\d+)", error).groups() for error in errors] == [("3", "2"), ("6", "2")]


def test_json_that_no_parser_takes_is_an_input_error(folder):
    for opening in ("[", '{"a":'):
        assert "line 1" in error_of(folder, opening * 100_000)
    assert "line 2" in error_of(folder, json.dumps(entry()) + '\n{"id": ' + "9" * 5000 + "}", "train.jsonl")
    assert "line 1 ('utf-8' codec can't decode byte 0xff in position 2" in error_of(folder, b'["\xff"]')
    assert "'utf-8' codec can't decode" in error_of(folder, json.dumps([entry()]).encode("utf-16"))


@pytest.mark.parametrize("content", ["", " \n", "[]"])
def test_a_file_without_samples_is_an_error(folder, content):
    assert "contains no samples" in error_of(folder, content)


def test_a_file_that_is_no_list_of_objects_is_an_error(folder):
    for content in ("3", '"a"', "null"):
        assert "entry #1: it is" in error_of(folder, content)
    assert "line 1, column 2" in (error := error_of(folder, '{\n"id": 1}')) and "[{...}, {...}], or each on" in error


@pytest.mark.parametrize("wrong", [[], "a", 3, None])
def test_an_entry_that_is_no_object_is_named_by_its_position(folder, wrong):
    assert "entry #2: it is" in error_of(folder, [entry(), wrong])


@pytest.mark.parametrize("wrong", [True, 1.5, [], {}, ""])
def test_an_id_of_the_wrong_type_is_an_error(folder, wrong):
    assert "entry #1: 'id' is" in error_of(folder, [entry(id=wrong)])


def test_an_id_that_occurs_twice_is_named(folder):
    assert "the id '7' occurs twice: give" in error_of(folder, [entry(id=7), entry(), entry(id="7")])


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (None, "'conversations' is missing or empty"),
        ([], "'conversations' is missing or empty"),
        ("hello", "'conversations' is a string"),
        ([HUMAN, "x"], "turn 2 is a string"),
        ([{"value": "x"}, GPT], "turn 1: unknown 'from' None"),
        ([HUMAN, {"from": "gpt"}], "turn 2: 'value' is missing or empty"),
        ([HUMAN, {"from": "gpt", "value": 55}], "turn 2: 'value' is a number"),
        ([{"from": None, "value": "x"}, GPT], "turn 1: unknown 'from' None"),
        ([HUMAN, {"from": "bot\n", "value": "x"}], "unknown 'from' 'bot\\n'"),
        ([{"from": "system", "value": "x"}, GPT], LAST_TWO),
        ([GPT], LAST_TWO),
        ([HUMAN], LAST_TWO),
        ([HUMAN, GPT, HUMAN], LAST_TWO),
        ([HUMAN, GPT, GPT], LAST_TWO),
        ([HUMAN, {"from": "system", "value": "x"}, GPT], LAST_TWO),
        ([HUMAN, {"from": "gpt", "value": " \n"}], "empty answer"),
        ([HUMAN, {"from": "gpt", "value": "<video>5%"}], "turn 2: <video> in a turn from 'gpt'"),
        ([{"from": "system", "value": "<video>"}, HUMAN, GPT], "turn 1: <video> in a turn from 'system'"),
        ([{"from": "human", "value": "<image>\nEF?"}, GPT], "1 <image> tag(s) in the human turns but 0 in 'image'"),
        ([HUMAN, {"from": "gpt", "value": "5% <image>"}], "turn 2: <image> in a turn from 'gpt'"),
        ([{"from": "human", "value": "<Images>"}, GPT], "turn 1: <Images> in 'value': write <image>"),
        (
            [{"from": "human", "value": "\ud800"}, GPT],
            "can't encode character '\\ud800' in position 0: surrogates not allowed",
        ),
        ([{"from": "human", "value": "<|im_end|>"}, GPT], "the user text contains the special token <|im_end|>"),
        ([{"from": "human", "value": "<video>"}, GPT], "1 <video> tag(s) in the human turns but 2 in 'video'"),
        ([{"from": "human", "value": "<video>" * 3}, GPT], "3 <video> tag(s) in the human turns but 2 in 'video'"),
        ([{"from": "human", "value": "<video>" * 2}, GPT] * 2, "4 <video> tag(s) in the human turns but 2 in 'video'"),
    ],
)
def test_a_wrong_conversation_is_an_error_that_names_the_sample(folder, turns, message):
    line = error_of(folder, [entry(id="ok"), entry(conversations=turns)])
    assert message in line and "sample 's1'" in line


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("", "a path in 'video' is missing or empty: give a string"),
        (["a.mp4", 3], "a path in 'video' is a number"),
        ([[]], "a path in 'video' is missing or empty"),
        ([["a.png", 3]], "a path in 'video' is a number"),
        ([[["a.png"]]], "a path in 'video' is a list"),
        (["a.png", "b.PNG"], "'video' holds 'a.png': put the frames of a video in a list of their own, [[...]]"),
        ({"a": 1}, "a path in 'video' is missing or empty"),
        ({"video": {"video": "a.mp4"}}, "a path in 'video' is an object"),
        ({"video": "a.mp4", "nframe": 4}, "'video' has an unknown option 'nframe': known ones are fps, nframes, "),
        ({"video": "a.mp4", "nframes": 4.5}, "'video': 'nframes' is 4.5: give a whole number"),
        ({"video": "a.mp4", "fps": "2"}, "'video': 'fps' is '2': give a number"),
        ({"video": "a.mp4", "fps": True}, "'video': 'fps' is True: give a number"),
        ({"video": "a.mp4", "fps": 0}, "'video': 'fps' is 0: give a number above 0"),
        ({"video": "a.mp4", "video_start": -1}, "'video': 'video_start' is -1: give a number above 0"),
        ({"video": "a.mp4", "video_end": math.nan}, "'video': 'video_end' is nan: give a number above 0"),
        (3, "a path in 'video' is a number"),
    ],
)
def test_a_wrong_video_is_an_error_that_names_the_sample(folder, video, message):
    line = error_of(folder, [entry(id="ok"), entry(video=video)])
    assert message in line and "sample 's1'" in line


def test_a_key_that_is_not_there_is_an_error(folder):
    incomplete = entry()
    del incomplete["conversations"]
    assert "sample 's1': 'conversations' is missing" in error_of(folder, [incomplete])


def test_videos_and_images_stand_in_the_order_of_their_tags(folder):
    (folder / "a.png").touch()
    (folder / "frames").mkdir()
    turns = [{"from": "human", "value": "<image> of <video>,\n<video><image>"}, GPT]
    own = {"video": "b.mp4", "nframes": 4, "video_start": 0.5}
    images = ["a.png", {"image": "a.png", "resized_width": 56, "resized_height": 84}]
    (sample,) = load_samples(
        [write(folder, [entry(video=["frames", own], image=images, conversations=turns)])], str(folder)
    )
    assert sample.media == (
        Media("image", str(folder / "a.png")),
        Media("video", str(folder / "frames")),
        Media("video", str(folder / "b.mp4"), (("nframes", 4), ("video_start", 0.5))),
        Media("image", str(folder / "a.png"), (("resized_height", 84), ("resized_width", 56))),
    )


def test_what_has_no_tags_comes_first_images_before_videos(folder):
    for name in ("a.png", "b.png"):
        (folder / name).touch()
    frames = {"video": ["a.png", "b.png"], "fps": 8}
    (sample,) = load_samples(
        [write(folder, [entry(video=frames, image="a.png", conversations=[HUMAN, GPT])])], str(folder)
    )
    assert sample.turns == (("user", "<image>\n<video>\nWhat is the EF?"),)
    paths = str(folder / "a.png"), str(folder / "b.png")
    assert sample.media == (Media("image", paths[0]), Media("video", paths, (("fps", 8),)))
    assert [media.name for media in sample.media] == ["a.png", "a.png and 1 more frames"]


@pytest.mark.parametrize("keys", [{}, {"video": None, "image": None}, {"video": [], "image": []}])
def test_a_sample_may_be_text_only(folder, keys):
    text_only = {"id": "s1", "conversations": [HUMAN, GPT], **keys}
    (sample,) = load_samples([write(folder, [text_only])], str(folder))
    assert sample.media == () and sample.turns == (("user", "What is the EF?"),)


def test_a_wrong_image_is_an_error_that_names_the_sample(folder):
    for image, message in [
        (["a.png", 3], "a path in 'image' is a number"),
        ([["a.png"]], "a path in 'image' is a list"),
        ({"image": "a.png", "fps": 2}, "'image' has an unknown option 'fps': known ones are resized_width, "),
        ("gone.png", "1 file(s) missing"),
        (str(folder), "1 file(s) missing"),
    ]:
        line = error_of(folder, [entry(id="ok"), entry(image=image)])
        assert message in line and "sample 's1'" in line


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("vidoe", "video"),
        ("videos", "video"),
        ("Video", "video"),
        (" video", "video"),
        ("vide\no", "video"),
        ("conversation", "conversations"),
        ("Conversations", "conversations"),
        ("converstations", "conversations"),
    ],
)
@pytest.mark.parametrize("replaces", [True, False], ids=["instead of the right key", "beside the right key"])
def test_a_misspelt_key_is_named_with_the_one_that_was_meant(folder, key, meant, replaces):
    misspelt = entry()
    misspelt[key] = misspelt.pop(meant) if replaces else "x"
    line = error_of(folder, [entry(id="ok"), misspelt])
    assert line.endswith(f"sample 's1': unknown key {key!r}, did you mean {meant!r}?")


def test_keys_of_the_users_own_are_allowed(folder):
    own = {"ef": 55.0, "split": "train", "view": "A4C", "": 0, "video_id": 1, "conversation_id": 2, "Videographer": "x"}
    own |= {"videoId": 3, "conversationId": 4, "video1": "x", "image": None, "image_id": 5}
    (sample,) = load_samples([write(folder, [entry(**own)])], str(folder))
    assert sample.id == "s1"


def test_all_missing_videos_are_counted_and_three_are_named(folder):
    entries = [entry(id=i, video=["a.mp4", f"gone{i}.mp4", "gone.mp4"]) for i in range(4)]
    line = error_of(folder, entries)
    assert "5 file(s) missing" in line and "--image_folder" in line
    named = ", ".join(f"{str(folder / name)!r} (sample {i!r})" for name, i in (("gone0.mp4", "0"), ("gone.mp4", "0")))
    assert f"missing: {named}, {str(folder / 'gone1.mp4')!r} (sample '1'), ...: set" in line


def test_other_errors_come_before_missing_videos(folder):
    assert "occurs twice" in error_of(folder, [entry(video="gone.mp4"), entry()])


def test_all_entries_can_be_read_beside_what_is_wrong_with_them(folder):
    entries = [
        entry(video="gone.mp4"),
        3,
        entry(id="s2", conversations=[HUMAN]),
        entry(),
        entry(id="s3", video="a.mp4"),
    ]
    read = list(Samples([write(folder, entries)], str(folder)).each())
    assert [written for _, written, _ in read] == entries
    assert [name for name, _, _ in read] == [f"#{n}" for n in range(1, 6)]
    assert [type(sample) for _, _, sample in read] == [Sample, InputError, InputError, DuplicateId, Sample]
    assert read[0][2].media == (Media("video", str(folder / "gone.mp4")),)


def test_control_characters_do_not_break_the_line(folder):
    line = error_of(folder, [entry(id="a\nb\x1b", video=["x\ny.mp4", "\x00", "\ud800.mp4"])], image_folder="f\n")
    assert r"'f\n/x\ny.mp4' (sample 'a\nb\x1b')" in line and "3 file(s) missing" in line
    with pytest.raises(InputError, match=r"gone\\n\.json"):
        load_samples([str(folder / "gone\n.json")])


WRITTEN = [
    {"a": [1, {"b": "],["}], "é": "\u2028 \U0001f600"},
    "[",
    -1.5e3,
    None,
    True,
    [],
    [[], {}],
    {},
    'a "quoted" {text} \\',
    "ä" * 1000,
]


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("start", [b"", b" \n", "\ufeff".encode(), "\ufeff\r\n\t".encode()])
def test_the_entries_of_a_list_are_found_however_it_is_written(folder, indent, ensure_ascii, start):
    text = json.dumps(WRITTEN, indent=indent, ensure_ascii=ensure_ascii, separators=(" ,\r\n", ":"))
    entries = Entries(write(folder, start + text.encode() + b"\n\n"))
    assert list(entries) == WRITTEN and len(entries) == len(WRITTEN)
    assert [entries[i] for i in reversed(range(len(WRITTEN)))] == WRITTEN[::-1]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_the_entries_of_lines_are_found_however_they_end(folder, end):
    found = [written for written in WRITTEN if isinstance(written, dict)] * 3
    lines = end.join(json.dumps(written, ensure_ascii=False) for written in found)
    for start, last in (("", ""), ("\ufeff", end), (end, "\n")):
        assert list(Entries(write(folder, (start + lines + last).encode(), "train.jsonl"))) == found


@pytest.mark.parametrize("text", ["[1 2]", "[1,]", "[,1]", "[1", "[", "[1]]", "[1] 2", "[1],", "{}]", "[1;2]", "[tru]"])
def test_what_is_nearly_a_list_is_malformed(folder, text):
    assert "malformed JSON at line 1" in error_of(folder, text)


def several(folder):
    """Two files, of three and two samples; the last of each has no id."""
    one = [entry(id="a"), entry(id="b", conversations=[HUMAN, {"from": "gpt", "value": "40%"}]), entry(id=None)]
    two = "\n".join(json.dumps(entry(id=sample_id)) for sample_id in ("c", None))
    return [write(folder, one), write(folder, two, "more.jsonl")]


def test_several_files_are_one_after_the_other_and_ids_are_unique_over_all(folder):
    paths = several(folder)
    samples = load_samples(paths, str(folder))
    assert [sample.id for sample in samples] == ["a", "b", "#3", "c", "#2.2"] and samples.sizes == [3, 2]
    assert [samples[i].id for i in (4, 0, 3, -1)] == ["#2.2", "a", "c", "#2.2"] and samples[1].answer == "40%"
    for index in (5, -6):
        with pytest.raises(IndexError):
            samples[index]
    with pytest.raises(InputError, match=r"more.jsonl': the id 'a' occurs twice, first in '.*train.json': give every"):
        load_samples([paths[0], write(folder, json.dumps(entry(id="a")), "more.jsonl")], str(folder))
    with pytest.raises(InputError, match=r"/./train.json' is given twice: name it once, with a weight"):
        load_samples([paths[0], f"{folder}/./train.json"], str(folder))
    with pytest.raises(InputError, match=r"empty.json' contains no samples"):
        load_samples([paths[0], write(folder, "[]", "empty.json")], str(folder))
    with pytest.raises(InputError, match=r"more.jsonl': sample '#2.1': 'conversations' is missing"):
        load_samples([paths[0], write(folder, "{}", "more.jsonl")], str(folder))
    with pytest.raises(InputError, match=r"train.json .*more.jsonl': 1 file\(s\) missing: '.*/no.mp4' \(sample 'z'\)"):
        load_samples([paths[0], write(folder, json.dumps(entry(id="z", video="no.mp4")), "more.jsonl")], f"{folder}/")


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_a_file_that_is_replaced_changes_nothing_and_of_one_that_is_changed_no_other_samples_are_read(folder, name):
    entries = [entry(id="a"), entry(id="b", conversations=[HUMAN, {"from": "gpt", "value": "40%"}]), entry(id="c")]
    text = json.dumps(entries) if name == "train.json" else "\n".join(map(json.dumps, entries))
    path = write(folder, text, name)
    samples = load_samples([path], str(folder))
    before = list(samples)
    (folder / "new.json").write_text("[]")
    os.replace(folder / "new.json", path)
    assert list(samples) == before
    samples = load_samples([write(folder, text, name)], str(folder))
    for changed in (text.replace("40%", "41%"), "[]"):  # in place; of the same length, and shorter
        (folder / name).write_text(changed)
        if name == "train.json":
            assert list(samples) == before  # a list was read whole
            continue
        for index in range(3):
            with pytest.raises(InputError) as caught:
                samples[index]
            assert str(caught.value) == f"{path!r} was changed while it is in use: restore it, and continue"
        item = PromptDataset(samples, None, 2, PromptOptions(OPTIONS))[BatchItem(0, 2)]  # as in a data worker
        assert isinstance(item, InputError) and "was changed" in str(item)


@pytest.mark.parametrize(("name", "share"), [("train.jsonl", 0.03), ("train.json", 1.1)])
def test_in_memory_is_only_where_each_line_stands_or_a_list_as_it_is_written(folder, name, share):
    """1,000 samples of 2 kB, read one by one, all at once or not at all."""
    turns = [{"from": "human", "value": "What is the EF? " * 120}, GPT]
    lines = [json.dumps({"id": i, "conversations": turns}) for i in range(1000)]
    path = write(folder, "\n".join(lines) if name == "train.jsonl" else f"[{','.join(lines)}]", name)
    tracemalloc.start()
    samples = Samples([path], str(folder))
    assert sum(len(sample.answer) for sample in samples) == 3 * len(samples)
    assert tracemalloc.get_traced_memory()[0] < share * os.path.getsize(path)
    tracemalloc.stop()
