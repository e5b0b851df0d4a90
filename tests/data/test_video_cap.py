from typing import get_args

import pytest

from data.sample import Media, Sample
from data.video_cap import VideoCap, at_random, cap_videos, choice_of, even, varies


def sample_of(*turns, videos=("a", "b", "c")):
    return Sample(id="s", media=tuple(Media("video", path) for path in videos), turns=tuple(turns), answer="55%")


def test_videos_and_tags_are_cut_together():
    sample = sample_of(("user", "<video>\n<video>\n<video>\nWhat is the EF?"))
    assert cap_videos(sample, 2) == sample_of(("user", "<video>\n<video>\nWhat is the EF?"), videos="ab")
    assert cap_videos(sample, 1) == sample_of(("user", "<video>\nWhat is the EF?"), videos="a")


def test_only_the_newline_right_after_a_dropped_tag_is_dropped():
    sample = sample_of(("user", "One <video>\n\ntwo\n<video>\n\nthree <video> end"))
    assert cap_videos(sample, 1).turns == (("user", "One <video>\n\ntwo\n\nthree  end"),)


def test_tags_are_counted_across_user_turns_in_order():
    sample = sample_of(
        ("system", "Watch."),
        ("user", "<video>\nView?"),
        ("assistant", "Apical."),
        ("user", "<video>\n<video>\nEF?"),
    )
    assert cap_videos(sample, 2) == sample_of(
        ("system", "Watch."),
        ("user", "<video>\nView?"),
        ("assistant", "Apical."),
        ("user", "<video>\nEF?"),
        videos="ab",
    )
    assert cap_videos(sample, 1).turns[3] == ("user", "EF?")


def test_a_sample_within_the_cap_is_left_alone():
    sample = sample_of(("user", "<video>\n<video>\n<video>\nEF?"))
    assert cap_videos(sample, 3) == cap_videos(sample, 5) == sample


def test_an_even_cap_is_spread_over_the_list():
    assert [sorted(even(10, most)) for most in (1, 2, 3, 5, 10, 11)] == [
        [5],
        [2, 7],
        [1, 5, 8],
        [1, 3, 5, 7, 9],
        list(range(10)),
        list(range(10)),
    ]
    assert all(len(even(num, most)) == min(num, most) for num in range(1, 40) for most in range(1, 45))
    sample = sample_of(("user", "a<video>b<video>c<video>d"))
    assert cap_videos(sample, 1, choose=even) == sample_of(("user", "ab<video>cd"), videos="b")


def test_a_random_cap_shows_all_videos_over_the_epochs_and_depends_on_seed_epoch_and_sample_only():
    for num, most in ((7, 3), (30, 5), (4, 4), (2, 5), (1, 1)):
        epochs = [at_random(0, "s", epoch)(num, most) for epoch in range(-(-num // most))]
        assert all(len(chosen) == min(num, most) for chosen in epochs)
        assert set().union(*epochs) == set(range(num))
        assert epochs == [at_random(0, "s", epoch)(num, most) for epoch in range(-(-num // most))]
    orders = {
        tuple(sorted(at_random(seed, name, epoch)(30, 5))) for name in "st" for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 8
    # Around the order 1, 4, 0, 3, 2, which the random numbers of "0 s" give.
    assert [sorted(at_random(0, "s", turn)(5, 2)) for turn in range(4)] == [[1, 4], [0, 3], [1, 2], [0, 4]]


def test_images_have_a_cap_of_their_own():
    turns = (("user", "<image> a <video> b <image> c <video>"),)
    media = tuple(Media(kind, name) for kind, name in (("image", "i"), ("video", "v"), ("image", "j"), ("video", "w")))
    sample = Sample("s", media, turns, "55%")
    capped = cap_videos(sample, 0, 1)
    assert capped.turns == (("user", "<image> a <video> b  c <video>"),) and [m.path for m in capped.media] == list(
        "ivw"
    )
    capped = cap_videos(sample, 1, 1)
    assert capped.turns == (("user", "<image> a <video> b  c "),) and [m.path for m in capped.media] == list("iv")


def test_zero_means_no_cap():
    sample = sample_of(("user", "<video>\n" * 40 + "EF?"), videos=[str(i) for i in range(40)])
    assert cap_videos(sample, 0) == sample


def test_tags_and_videos_agree_after_every_cap():
    sample = sample_of(("user", "<video>" * 4), ("assistant", "x"), ("user", "<video>\n" * 3), videos="abcdefg")
    for cap in range(1, 9):
        capped = cap_videos(sample, cap)
        assert sum(text.count("<video>") for _, text in capped.turns) == len(capped.media) == min(cap, 7)


@pytest.mark.parametrize("cap", get_args(VideoCap))
def test_every_cap_has_a_choice(cap):
    """By whichever of them, as many as possible of the videos that there are, and no others."""
    assert all(
        len(chosen := choice_of(cap)(num, most)) == min(num, most) and chosen <= set(range(num))
        for num in range(1, 20)
        for most in range(1, 20)
    )


def test_the_choices_are_those_of_their_names_and_only_a_random_one_varies():
    assert {cap: sorted(choice_of(cap)(10, 2)) for cap in get_args(VideoCap)} == {
        "first": [0, 1],
        "even": [2, 7],
        "random": [2, 7],  # of held-out samples
    }
    assert [cap for cap in get_args(VideoCap) if varies(cap)] == ["random"]
