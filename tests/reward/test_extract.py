import time

import pytest

from reward.extract import extract_number, says_two_numbers, without_thoughts


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The EF is 65.4%", 65.4),
        ("The EF is 65.4 %", 65.4),
        ("65 percent", 65),
        ("65 Per Cent", 65),
        ("a 65-percent fraction", 65),
        ("65％", 65),
        ("６５％", 65),
        (r"\boxed{55\%}", 55),
        ("**55%**", 55),
        ("EF=55%", 55),
        ("射血分数为55%。", 55),
    ],
)
def test_percentages_are_read_in_every_spelling(text, number):
    assert extract_number("Of 2000 and " + text) == number  # only as a percentage does it come before 2000


def test_a_percentage_comes_before_an_earlier_bare_number():
    assert extract_number("With a volume of 120 mL the EF is 55%, not 60%.") == 55


def test_the_first_bare_number_is_taken_without_a_percentage():
    assert extract_number("It is 55, or maybe 60.") == 55


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("45.2", 45.2),
        ("EF is 45.", 45),
        ("EF is 45.\nclips are good", 45),
        ("EF is 45, image quality is good", 45),
        (".5", 0.5),
        ("approx.55", 55),
        ("wait...55", 55),
        ("0", 0),
        ("45,2", 45.2),
        ("0,055", 0.055),
        ("10,20,30", 10),
        ("10,20,30%", 30),
        ("1,234.5", 1234.5),
        ("1,234,567", 1234567),
        ("40...45", 40),
        ("40..45", 40),
        ("1.2.3", None),
        ("", None),
        ("No number", None),
        ("nan inf Infinity", None),
    ],
)
def test_decimals_thousands_and_lists_are_told_apart(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-18.5%", -18.5),
        ("strain is -18.5", -18.5),
        ("\u221218.5", -18.5),
        ("(-18)", -18),
        ("=-18", -18),
        ("+18", 18),
        ("- 18", 18),
        ("55-60%", 60),
        ("55 -60%", 60),
        ("(55)-60%", 60),
        ("55% -60", 55),
        ("EF-55%", 55),
        ("55\u201360%", 60),
        ("--5", 5),
        ("between 55% and -60%", 55),
        ("55 ± 5%", 55),
        ("55 +/- 5%", 55),
    ],
)
def test_a_hyphen_is_a_minus_sign_only_where_it_can_be_one(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "3 videos",
        "the 2 clips",
        "3 different echo videos",
        "view 2",
        "View #2 is good",
        "a good view 2.",
        "video 3:",
        "video no. 3",
        "view number 2",
        "frame #12",
        "#12",
        "frame-12",
        "views 2, 3 and 4",
        "views 2,3",
        "view 2 and 3",
        "videos 1-3",
        "2-3 videos",
        "2 or 3 videos",
        "in 5 of the 7 views",
        "in 5 out of 7 views",
        "in 5/7 views",
        "4-chamber",
        "the 4 chamber view",
        "2D",
        "A4C",
        "1st",
        "mp4",
        "view_2",
        "5e400",
        "55é",
        "1. The heart is normal\n2) The view is good",
        "In 100% of the clips the wall moves",
        "50% of 4 views",
    ],
)
def test_a_number_that_counts_or_labels_is_no_answer(text):
    assert extract_number(text) is None
    assert extract_number(f"{text}\nand so 61") == 61


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("video 3: 55", 55),
        ("For view 2, 55", 55),
        ("EF 55% image quality good", 55),
        ("55% of the blood", 55),
        ("In views 1-3, 55.5", 55.5),
        ("overview 55", 55),
        ("the clip shows 55", 55),
        ("in this view 55%", 55),
        ("55 (4-chamber view)", 55),
        ("72 beats per minute", 72),
        ("72 beats/min", 72),
        ("55 mm", 55),
        ("55. The heart is normal", 55),
        ("EF is 5. That is low", 5),
        ("Based on 3 videos and view 2 in 2D A4C, EF is 48", 48),
    ],
)
def test_a_number_near_a_counting_word_may_be_the_answer(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<answer>55</answer>", 55),
        ("I see 40%. <Answer> 55\n</ANSWER> 60%", 55),
        ("40% <answer>none</answer> 60%", None),
        ("40% <answer>3 videos</answer>", None),
        ("40 <answer>55", 40),
        ("</answer>40<answer>55</answer>60", 55),
    ],
)
def test_only_the_answer_block_is_read_if_there_is_one(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<think>It may be 40%.</think>The EF is 55.", 55),
        ("The EF is 55. <think>Or 40%?</think>", 55),
        ("<think>40%</think>50<think>60%</think>", 50),
        ("<think>40%", None),
        ("<think>40%</think>", None),
        ("It may be 40%.</think>The EF is 55.", 55),
        ("It may be 40%.\n</THINK>\n", None),
        ("</think>40", 40),
        ("<think>40%</think><answer>55", 55),
        ("40%</think><answer>55</answer>60%", 55),
        ("<think>40%<answer>55</answer>", 55),  # an answer block, wherever it stands
        ("<think>As <answer>60%</answer> says</think><answer>55</answer>", 55),  # but one outside of thoughts first
    ],
)
def test_without_an_answer_block_only_what_is_no_thought_is_read(text, number):
    assert extract_number(text) == number


# What people and models write: all of it says one number.
PHRASES = [
    # English
    ("LVEF55%", 55),
    ("The visually estimated EF is 55%.", 55),
    ("Ejection fraction: 55 percent.", 55),
    ("EF (55 %)", 55),
    ("EF≈55%", 55),
    ("Ejection fraction (%): 55", 55),
    ("In the apical 2- and 4-chamber views the EF is 55%.", 55),
    ("In the apical 2- and 4-chamber views the EF is 55.", 55),
    ("In the apical 2 and 4 chamber views the EF is 55%.", 55),
    ("Frame 10 of 32 is end-diastole, frame 21 end-systole, EF 55%.", 55),
    ("Frame 10 of 32 is end-diastole, so the EF is 55", 55),
    ("Views 2, 3, 4 were read: EF 55", 55),
    ("EDV 120 ml, ESV 54 ml, EF 55%", 55),
    ("Biplane Simpson (A4C 54 ml, A2C 57 ml): LVEF 55.5 %", 55.5),
    ("EF = (EDV - ESV) / EDV × 100% = 55%", 55),
    ("EF = (EDV-ESV)/EDV*100% = 55%", 55),
    ("EF = (120 - 54) / 120 * 100 % = 55 %", 55),
    ("EF = (120 - 54)/120 x 100% = 55%", 55),
    ("EF = 100% × (120 - 54) / 120 = 55%", 55),
    ("EF = 100%*(120-54)/120 = 55%", 55),
    ("EF 55 ± 5%, 72 beats per minute", 55),
    ("EF 55% ± 5%", 55),
    ("A 65-year-old man, examined on 12/03/2024: EF 55%.", 55),
    ("On 2024-03-12 the EF was 55%, or 0.55.", 55),
    ("NYHA class 3, stage 2, mitral valve 1.5 cm: EF 30%", 30),
    ("Global strain −18.5 %", -18.5),
    # Markdown
    ("### 1. Left ventricle\nNormal.\n### 2. Ejection fraction\n55%", 55),
    ("### 1. Left ventricle\nNormal.\n### 2. Ejection fraction\n55", 55),
    ("## 1 Left ventricle\nNormal.\n## 2.1 Ejection fraction\n55", 55),
    ("**1. Left ventricle:** normal.\n**2. Ejection fraction:** 55", 55),
    ("**2.** Ejection fraction: 55", 55),
    ("> 2. EF: 55", 55),
    ("- 2) EF: 55", 55),
    ("(1) Normal size\n(2) EF 55", 55),
    ("10. EF: 55", 55),
    ("1. **Step 1**: 30 frames\n2. **Step 2**: EF 55%", 55),
    ("| View | EF |\n|---|---|\n| A4C | 55% |", 55),
    ("* **EF:** 55%", 55),
    ("- 55", 55),
    ("### 55", 55),
    ("# 55 %", 55),
    ("**55**%", 55),
    ("* 100%", 100),
    ("The stenosis is *100%*, or **100%**", 100),
    # LaTeX
    (r"\boxed{55.5\%}", 55.5),
    (r"$\boxed{\text{EF} = 55\,\%}$", 55),
    (r"$\mathbf{55}\%$", 55),
    (r"$55 \pm 5\%$", 55),
    (r"\frac{120 - 54}{120} \times 100\% = 55\%", 55),
    (r"\(EF = \frac{EDV - ESV}{EDV} \cdot 100\,\% = 55\,\%\)", 55),
    # German
    ("Die EF beträgt 55,5 %.", 55.5),
    ("EDV 120, LVEF 55 Prozent", 55),
    ("2D-Echo vom 12.03.2024: LVEF ca. 55 %", 55),
    ("Im 2- und 4-Kammerblick EF 55", 55),
    ("Eine 55%ige EF bei EDV 120 ml", 55),
    ("1. Linker Ventrikel: normal\n2. Ejektionsfraktion: 55", 55),
    # Chinese
    ("左室EF65%", 65),
    ("左室射血分数（LVEF）：５５％。", 55),
    ("第2个视频，共30帧：射血分数约为55", 55),
    ("2024年3月12日，4腔心切面，射血分数55", 55),
    ("1、左室大小正常\n2、射血分数：55", 55),
    ("（1）左室正常\n（2）EF：55", 55),
    ("患者65岁，EDV 120ml，ESV 54ml，EF=(120-54)/120×100%=55%", 55),
]


@pytest.mark.parametrize(("text", "number"), PHRASES)
def test_what_people_write_around_a_number_is_no_second_one(text, number):
    assert extract_number(text) == number and not says_two_numbers(text)
    assert extract_number(f"<think>40%</think>{text}") == number


def test_a_number_too_large_for_a_float_is_none():
    assert extract_number("9" * 400) is None
    assert extract_number("9" * 400 + "%") is None
    assert extract_number("9" * 400 + " or 55") == 55
    assert extract_number("1" + "0" * 101) is None


@pytest.mark.parametrize(
    "piece",
    ["1 ", " ", ",", ".", "1,", "1.", ",111", "-", "1-", "%", "#", "1%%", "<answer>", "view ", "views 1, ", "1 of "]
    + ["1 of the ", "1 different ", "55 ± ", "A1", "\n", "1\n", " 1 -", "9", "1 clip ", "clips1 "]
    + [
        "view 1, ",
        "view 1 and ",
        "#1",
        "100% of ",
        "100% x ",
        "× ",
        "# 1.",
        "1- ",
        "1 - ",
        "1 ± 1 ",
        "*",
        "1.1",
        "百1",
    ],
)
def test_hostile_text_is_read_in_linear_time(piece):
    text = piece * (20_000 // len(piece))
    started = time.process_time()
    extract_number(text)
    extract_number("1" + text + "x")
    extract_number("view 1" + text + " 55%")
    extract_number("# views 1" + text + "1")
    assert time.process_time() - started < 1.0  # quadratic time takes many


@pytest.mark.parametrize(
    "text",
    [
        "55 or 60",
        "55% or 60%",
        "It is 60%, no: 55%",
        "55-60%",
        "EF 55–60 %",
        "EF 55% (before: 48%)",
        "Ejektionsfraktion 55 % (Vorbefund 48 %)",
        "射血分数为55%-60%",
        "EDV 120 ml, ESV 54 ml, EF 55",
        "10,20,30",
        "5 or -5",
        "<answer>55%</answer> or 60%",
        "<think>hm</think>55%<think>hm</think>60%",
        "<think></think>55 60",
        "55 <think></think> 60",
        "30% <think> 55% </think> 55%",
        "40</think>55 60",
        "55<think>40</think>60</think>",
        "<answer>55</answer> or 60%",
        "60% <answer>55</answer>",
        "12/03: 55",
    ],
)
def test_two_different_numbers_are_found_wherever_they_are_said(text):
    assert says_two_numbers(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "55",
        "55%, so the answer is 55 percent",
        "55 and 55.0 and 55,0",
        "55%" * 5,
        "3 videos, view 2, 4-chamber: 55%",
        "55 ± 5",
        "55 ± 5%",
        "9" * 400 + " or 55",
        "9" * 400 + "% or 55",
        "55% or 60",
        "It is 60, no: 55%",
        "120 ml, 55%",
        "55% on 12.03.2024",
        "<answer>none</answer> 55",
        "<think>40, or 50</think>55%",
        "<Think>40%\n</THINK><answer>55%</answer>",
        "<think>40</think>55%<think>60",
        "55% <think>60 <think>70",
        "<think>40 <think>50</think>55%",
        "55</think>60",
        "40, or 50</THINK><answer>55</answer>",
        "40</think>55<think>60</think>55",
    ],
)
def test_a_number_said_again_or_thought_or_counted_is_no_second_one(text):
    assert not says_two_numbers(text)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("", ""),
        ("abc", "abc"),
        ("<think>a</think>b", "\nb"),
        ("a<THINK>b</Think>c", "a\nc"),
        ("a<think>b\nc</think>d<think></think>e", "a\nd\ne"),
        ("a<think>b", "a"),
        ("a<think>b</think>c<think>d", "a\nc"),
        ("a<think>b<think>c</think>d", "a\nd"),
        ("<think>a</think>b</think>c", "\nb</think>c"),
        ("a</think>b", "b"),
        ("a\n</THINK>b", "b"),
        ("</think>b", "b"),
        ("a</think>", ""),
        ("a</think>b<think>c</think>d", "b\nd"),
        ("a</think>b<think>c", "b"),
        ("a<think >b</think>c", "c"),  # no opening tag
        ("a</think >b", "a</think >b"),
    ],
)
def test_thoughts_are_cut_out_and_those_without_an_end_or_a_beginning_reach_to_that_of_the_text(text, rest):
    assert without_thoughts(text) == rest


def test_numbers_on_both_sides_of_a_thought_do_not_become_one():
    assert says_two_numbers("5<think></think>6")
    assert not says_two_numbers("5<think></think>5")


# Two different numbers end the search, so these say the same one again and again, or none.
@pytest.mark.parametrize(
    "piece",
    ["1 ", "1-", "1%%", "1,", ",111", "1 of ", "1 of the ", "1 different ", "1\n", " 1 -", "views 1, ", "1 clip ", "9"]
    + ["<think>", "</think>", "<think></think>", "<think>1</think>1 ", "<THINK>1", "1<think>2", "<think", "1%"],
)
def test_two_numbers_are_looked_for_in_linear_time(piece):
    text = piece * (20_000 // len(piece))
    started = time.process_time()
    says_two_numbers("1 " + text + "x")
    assert time.process_time() - started < 2.0  # quadratic time takes many


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<think></think>", "<think>1", "<think", "<", "</think><think>"]
)
def test_thoughts_are_cut_out_in_linear_time(piece):
    text = piece * (1_000_000 // len(piece))
    started = time.process_time()
    without_thoughts(text)
    assert time.process_time() - started < 2.0  # quadratic time takes minutes
