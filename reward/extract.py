"""Extract the number that a text gives as its answer."""

import re
from collections.abc import Iterator
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

# Sampled text can be long and strange, so the time must be linear in its length: every pattern below is matched at one
# position or in a short window before it, and every run of digits is scanned a bounded number of times.
_THING = rf"(?:{'|'.join(THINGS)})"
_LETTER = "A-Za-z_\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u04ff"  # no Chinese: it is written without spaces
_RUN = re.compile(rf"(?:(?<![{_LETTER}0-9.])\.)?[0-9][0-9.,]*")
_GLUED_BEFORE = re.compile(rf"[{_LETTER}]\Z")
_GLUED_AFTER = re.compile(rf"-?[{_LETTER}]")  # "2D", "1st", and compounds: "4-chamber"
_PERCENT = re.compile(r" ?\\?%|[ -]?per ?cent\b", re.IGNORECASE)
_HYPHEN = re.compile(r"(?:[\w).-]|[0-9] )-\Z")  # "55-60", "55 -60", "EF-55": not a minus sign
_MARGIN = re.compile(r"(?:±|\+/-) ?\Z")  # "55 ± 5"
_LIST_ITEM = re.compile(r"^[0-9][.)] ", re.MULTILINE)  # "1. The heart is ..."
_LABEL = re.compile(
    rf"\b{_THING}(?:[ -]?| [0-9]+ (?:and|or|to|&) "  # "view 2", "view 2 and 3"
    r"|s (?:[0-9]+(?:,? (?:and|or|to|&) | ?[-–] ?|, ?))*)"  # "views 2, 3 and 4"
    r"(?:#|no\.? ?|number )?\Z|#\Z",
    re.IGNORECASE,
)
_COUNT = re.compile(
    r"(?: (?:of|out of|to|or)(?: (?:the|these|those|all)){0,2}(?: [0-9]+)?|[/–-][0-9]+)?"  # "5 of the 7 views"
    rf"(?: (?:{'|'.join(ADJECTIVES)})){{0,3}} {_THING}s?\b(?! per\b|/min)",  # "72 beats per minute" is a measurement
    re.IGNORECASE,
)
_WINDOW = 48  # characters; longer than any label

_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[0-9]+,[0-9]+")
_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_SEVERAL_POINTS = re.compile(r"\.[0-9]+\.[0-9]")  # "55%.3.3", "12.03.2024": no number, but more than one
_LARGEST = 1e100  # larger numbers are no measurements; up to here, squared errors are finite

_ONE_SPELLING = str.maketrans("０１２３４５６７８９．％\u2212\u2010\u2011", "0123456789.%---")


@lru_cache(maxsize=4096)  # the texts of constant answers and the truths are read again and again
def extract_number(text: str) -> float | None:
    """Return the number that a text gives as its answer, None if there is none.

    Looks only inside `<answer>…</answer>` if there is one, else outside of `<think>` parts. Returns the first
    percentage, else the first bare number that is not a count or a label; always finite.
    """
    first_bare = None
    for values, is_percentage in _runs(_answer_block(text), one_bare=True):
        if is_percentage:
            return values[-1]  # of a list "10,20,30%" the last one carries the sign
        first_bare = values[0]
    return first_bare


@lru_cache(maxsize=4096)
def says_two_numbers(text: str) -> bool:
    """Say whether a text has two different numbers outside its `<think>` parts; counts and labels are none."""
    said, text = set(), without_thoughts(text)
    if _SEVERAL_POINTS.search(text.translate(_ONE_SPELLING)):
        return True
    for values, _ in _runs(text):
        said.update(values)
        if len(said) > 1:
            return True
    return False


def without_thoughts(text: str) -> str:
    """Return a text without its `<think>…</think>` parts; one that is not closed reaches to the end.

    What stands before a first `</think>` without its opening tag, which some prompts end with, is a thought, too.
    """
    # Splits and searches, which are linear: one pattern with `.*?` would scan to the end for each unclosed tag.
    first, *others = re.split("<think>", text, flags=re.IGNORECASE)
    first = re.split("</think>", first, maxsplit=1, flags=re.IGNORECASE)[-1]
    after = (re.split("</think>", other, maxsplit=1, flags=re.IGNORECASE)[1:] for other in others)
    return "\n".join([first, *(text for rest in after for text in rest)])


def _runs(text: str, one_bare: bool = False) -> Iterator[tuple[list[float], bool]]:
    """Yield each run of digits that is no count or label: its numbers, and whether they are percentages.

    one_bare: after the first that are none, yield only percentages, which is faster.
    """
    has_bare = False
    text = text.translate(_ONE_SPELLING)
    text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    for run in _RUN.finditer(text):
        start, end = run.span()
        percent = _PERCENT.match(text, end)
        if (one_bare and has_bare and not percent) or _is_no_answer(text, start, end, percent):
            continue
        values = _values(run.group())
        if not values:
            continue
        before = text[max(start - 3, 0) : start]
        if before.endswith("-") and not _HYPHEN.search(before):
            values[0] = -values[0]
        has_bare = has_bare or not percent
        yield values, bool(percent)


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


def _is_no_answer(text: str, start: int, end: int, percent: re.Match | None) -> bool:
    """Say whether the run of digits text[start:end] is part of a word, a count, a label or a margin."""
    window = max(start - _WINDOW, 0)
    if _GLUED_BEFORE.search(text, max(start - 1, 0), start) or _MARGIN.search(text, max(start - 4, 0), start):
        return True
    if percent:  # a percentage counts only in "100% of the clips"
        after = percent.end()
        return text.startswith((" of ", " out of "), after) and bool(_COUNT.match(text, after))
    ends_in_digit = text[end - 1].isdigit()  # otherwise a full stop or comma separates it from what follows
    if ends_in_digit and _GLUED_AFTER.match(text, end):
        return True
    if _LIST_ITEM.match(text, start):
        return True
    if "." in text[start:end].rstrip(".,"):  # nobody counts in decimals
        return False
    return bool((ends_in_digit and _COUNT.match(text, end)) or _LABEL.search(text, window, start))


def _values(run: str) -> list[float]:
    """Read a run of digits, points and commas as one number, or as those of a list; leave out what is unreadable."""
    run = run.rstrip(".,")
    if _THOUSANDS.fullmatch(run):
        parts = [run.replace(",", "")]
    elif _DECIMAL_COMMA.fullmatch(run):
        parts = [run.replace(",", ".")]
    else:
        parts = re.split(r",|\.{2,}", run)
    values = [float(part) for part in parts if _PLAIN.fullmatch(part)]
    return [value for value in values if value <= _LARGEST]
