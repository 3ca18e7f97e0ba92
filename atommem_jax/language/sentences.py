"""Where sentences end: one rule for a person's documents and for the paragraphs of data sets.

It takes prose of languages with capitals, Chinese and Japanese, and Markdown, in a time that grows
with the length of the text, whatever the text.

No library does it: pysbd, the light one, was released last in 2021, finds fewer of the sentences
that HotpotQA and 2WikiMultihopQA publish (F1 .969, here .981), and its time grows with the square
of the length; those that find more load models of many megabytes; none keeps white space and knows
Markdown.
"""

import re

_ALWAYS = re.compile(
    r"(?:a\.k\.a|approx|capt|cf|cmdr|col|cpl|dept|dr|e\.g|esp|fr|ft|gen|gov|hon|i\.e|lt|maj|messrs|"
    r"mlle|mme|mrs?|ms|mt|ph\.d|pres|prof|rep|rev|sen|sgt|jr|sr|st|v|viz|vs)",
    re.IGNORECASE,
)
# "May" is a word, "No" too: these are short for something only where a number follows.
_BEFORE_NUMBERS = re.compile(
    r"(?:[a-z]|apr|art|aug|ca|ch|dec|eq|est|feb|figs?|jan|jul|jun|mar|nos?|nov|oct|op|pp|sec|sept?|vols?)",
    re.IGNORECASE,
)
_BREAK = re.compile(
    r"""
    # A stop, what closes with it, and white space; stops of Chinese need none. Looking back, and
    # never giving back (++), keep a row of stops from being read once for each of them.
    (?<! [.!?\u2026] ) (?P<stop> [.!?\u2026]++ ["'\u2019\u201d\u00bb)\]*_]*+ \s++ )
    | [\u3002\uff01\uff1f\uff61] [\u2019\u201d\u300d\u300f\uff09]*+ \s*+
    # An empty line.
    | \n [^\S\n]*+ \n \s*+
    # Before an item, a quotation, a table, a heading or code in Markdown; after a heading or a row.
    | \n (?= [^\S\n]*+ (?: \#{1,6}\s | [-*+\u2022]\s | \d{1,3}[.)]\s | [|>] | ``` ) )
    | ^ [^\S\n]*+ (?: \#{1,6}\s | \| ) [^\n]*+ \n \s*+
    """,
    re.VERBOSE | re.MULTILINE,
)
_GLUED = re.compile(r"(?<=[a-z]{2})\.(?=[A-Z][a-z])")
# What opens a sentence, and its first character.
_FOLLOWING = re.compile(r"[\"'\u2018\u201c\u00ab(\[*_]*+(.)", re.DOTALL)
_LONGEST = 24  # characters before a stop that are looked at


def split(text: str, *, glued: bool = False) -> list[str]:
    """The text, cut where a sentence, a paragraph, a heading or an item of a list ends.

    A stop ends a sentence where white space and no small letter follow, but not after an initial
    or a common abbreviation. White space stays with what stands before it: joined, the sentences
    are the text again.

    Args:
      text: to cut.
      glued: also cut at a full stop between "word" and "Word" without white space, as where a
        data set has lost it. In other texts this may be a name, such as "System.Out".
    """
    ends = [match.end() for match in _BREAK.finditer(text) if not _goes_on(text, match)]
    if glued:
        ends = sorted({*ends, *(match.end() for match in _GLUED.finditer(text))})
    found, start = [], 0
    for end in [*ends, len(text)]:
        if end > start:
            found.append(text[start:end])
            start = end
    return found


def _goes_on(text: str, match: re.Match[str]) -> bool:
    """Whether the sentence does, after what looks like its end."""
    stop = match["stop"]
    if stop is None or stop.count("\n") > 1:
        return False
    opened = _FOLLOWING.match(text, match.end())
    if opened is None or opened[1].islower() or opened[1] in ".!?\u2026,;":
        return True
    if stop[0] != "." or not stop[1:].isspace():
        return False
    line = text[max(0, match.start() - _LONGEST) : match.start()].rpartition("\n")[2]
    if re.fullmatch(r"\s*\d{1,3}", line):
        return True  # the number of an item
    word = re.split(r"[\s(\[\"'\u2018\u201c\u2013\u2014]", line)[-1]
    if opened[1].isdigit() and _BEFORE_NUMBERS.fullmatch(word):
        return True
    return _ALWAYS.fullmatch(word) is not None or _is_initials(word)


def _is_initials(word: str) -> bool:
    return all(len(part) == 1 and part.isupper() for part in word.split("."))
