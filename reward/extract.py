"""Extract the number that a text gives as its answer."""

import re
from functools import lru_cache

# A number next to one of these words is a count or a label ("3 videos", "view 2", "4 chamber"), not an answer.
# Units of measurement are not in the list: "55 mm" is an answer.
THINGS = """
    video clip view frame image loop scan file recording sequence series window study studies case patient
    sample chamber segment valve leaflet lead beat heartbeat cycle step part item option question example
    figure fig table grade stage class type
""".split()
# Words that may come between the number and the thing: "3 short echo clips".
ADJECTIVES = """
    apical parasternal cardiac heart echo echocardiographic echocardiography echocardiogram ultrasound video
    different separate individual consecutive available provided given input short
""".split()

_THING, _ADJECTIVE = f"(?:{'|'.join(THINGS)})", f"(?:{'|'.join(ADJECTIVES)})"

# A text is cut into tokens: what has digits but is no answer, and numbers. Sampled text can be long and strange, so the
# time must be linear in its length: a token that can fail looks at a few runs of digits, and the last kind takes any.
_LETTER = "A-Za-z_\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u04ff"  # no Chinese, which is written without spaces,
_LETTER += "第个個张張段腔维維帧幀年月日"  # but for what stands between numbers and things: "第2个视频"
_RUN = rf"(?>(?:(?<![{_LETTER}0-9.])\.)?[0-9](?:[0-9.,]*[0-9])?)"
_PERCENT = r"(?:[ )}*_$~\\,;]{0,5}%|[ -]?(?:per ?cent|prozent)\b)"  # "55 %", "55\,\%", "**55**%"
_MARGIN = rf" ?(?:±|\+/-|\\pm) ?{_RUN}"
_TIMES = r"(?:[×·]|\\times|\\cdot|\bx|(?<=\S )\*(?= )|(?<=[^\s*])\*(?=[0-9(]))"  # no "* 100%" of a list, no "*100%*"
_WHOLE = rf"[0-9]+(?!\.?[0-9]|{_PERCENT})"  # nobody counts in decimals or percent
_AND, _NO = r",? (?:and|or|to|of|&) ", r"[ -]?(?:#|no\.? ?|number )?"
_OF_THINGS = (
    r"(?: (?:of|out of|to|or)(?: (?:the|these|those|all)){0,2}(?: [0-9]+)?|[/–-][0-9]+)?"
    rf"(?: {_ADJECTIVE}){{0,3}} {_THING}s?\b(?! per\b|/min)"  # "72 beats per minute" is a measurement
)
_NO_ANSWER = [
    rf"^(?:[-#>*+|•_ ]*\(?1?[0-9][.)、]|#+ [0-9.]+(?!{_PERCENT}))[*_]*(?: |(?=[^\W\d_]))",  # "**2. Ejection fraction**"
    rf"{_TIMES} ?100{_PERCENT}|100{_PERCENT} ?{_TIMES}",  # "(EDV - ESV) / EDV × 100%"
    rf"\b{_THING}s{_NO}{_WHOLE}(?:(?:{_AND}|, ?| ?[–-] ?){_WHOLE})*",  # "views 2, 3 and 4"
    rf"(?:\b{_THING}{_NO}|#){_WHOLE}(?:{_AND}{_WHOLE})?",  # "view 2", "frame 10 of 32", "#2"
    rf"[0-9]+{_OF_THINGS}",  # "3 short clips", "5 of the 7 views"
    rf"{_RUN}{_PERCENT}(?= (?:out )?of ){_OF_THINGS}",  # "100% of the clips"
    rf"(?:(?<=[{_LETTER}]){_RUN}|{_RUN}(?=(?:- ?)?[{_LETTER}]))(?!{_PERCENT})",  # "A4C", "2D", "2- and 4-chamber"
    rf"{_MARGIN}{_PERCENT}?",  # "55% ± 5%"
]
_NUMBER = (
    r"(?P<minus>(?<![\w).%-])-)?"  # not in "55-60", "EF-55"
    rf"(?P<numbers>{_RUN}(?: ?[–-] ?{_RUN}(?={_PERCENT}))?)(?P<percent>(?:{_MARGIN})?{_PERCENT})?"
)
_TOKEN = re.compile("|".join([*_NO_ANSWER, _NUMBER]), re.IGNORECASE | re.MULTILINE)

_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[0-9]+,[0-9]+")
_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_LARGEST = 1e100  # larger numbers are no measurements; up to here, squared errors are finite

_ONE_SPELLING = str.maketrans("０１２３４５６７８９．％﹪（）\u2212\u2010\u2011", "0123456789.%%()---")


@lru_cache(maxsize=4096)  # the texts of constant answers and the truths are read again and again
def extract_number(text: str) -> float | None:
    """Return the number that a text gives as its answer, None if there is none.

    Looks only inside `<answer>…</answer>` if there is one, else outside of `<think>` parts. Returns the first
    percentage, else the first bare number that is not a count or a label; always finite.
    """
    return next(iter(_numbers(_answer_block(text))), None)


@lru_cache(maxsize=4096)
def says_two_numbers(text: str) -> bool:
    """Say whether a text has, outside its `<think>` parts, a number beside the one that is read from it.

    Like is compared with like: where it has percentages, bare numbers do not count.
    """
    return len({extract_number(text), *_numbers(without_thoughts(text))} - {None}) > 1


def _numbers(text: str) -> list[float]:
    """Return the percentages in a text, or the bare numbers of one without, the one to read first."""
    percentages, bare = [], []
    text = "\n".join(" ".join(line.split()) for line in text.translate(_ONE_SPELLING).splitlines())
    for token in _TOKEN.finditer(text):
        values = _values(token["numbers"] or "")
        if values and token["minus"]:
            values[0] = -values[0]
        if token["percent"]:
            percentages += reversed(values)  # of "55-60%" the last one carries the sign
        else:
            bare += values
    return percentages or bare


def without_thoughts(text: str) -> str:
    """Return a text without its `<think>…</think>` parts; one that is not closed reaches to the end.

    What stands before a first `</think>` without its opening tag, which some prompts end with, is a thought, too.
    """
    # Splits and searches, which are linear: one pattern with `.*?` would scan to the end for each unclosed tag.
    first, *others = re.split("<think>", text, flags=re.IGNORECASE)
    first = re.split("</think>", first, maxsplit=1, flags=re.IGNORECASE)[-1]
    after = (re.split("</think>", other, maxsplit=1, flags=re.IGNORECASE)[1:] for other in others)
    return "\n".join([first, *(text for rest in after for text in rest)])


def _answer_block(text: str) -> str:
    """Return what stands between the first `<answer>` and the next `</answer>`, else what is no thought.

    A block outside of thoughts comes first: a thought may quote another.
    """
    said = without_thoughts(text)
    for part in (said, text):
        # Two searches: one pattern with `.*?` would scan to the end of the text again for each unclosed tag.
        opened = re.search("<answer>", part, re.IGNORECASE)
        closed = opened and re.compile("</answer>", re.IGNORECASE).search(part, opened.end())
        if closed:
            return part[opened.end() : closed.start()]
    return said


def _values(numbers: str) -> list[float]:
    """Read a number, or those of a list or range; leave out what is unreadable."""
    values = []
    for run in re.split(" ?[–-] ?", numbers):
        if _THOUSANDS.fullmatch(run):
            run = run.replace(",", "")
        elif _DECIMAL_COMMA.fullmatch(run):
            run = run.replace(",", ".")
        values += [float(part) for part in re.split(r",|\.{2,}", run) if _PLAIN.fullmatch(part)]
    return [value for value in values if value <= _LARGEST]
