"""Where paragraphs and sentences begin, by rule.

Positions are character indices, ascending, the first 0: the spans are text[starts[i] : starts[i + 1]], and
together they are the text.
"""

import re

PARAGRAPH_BREAK = re.compile(r"\n{2,}")

# Chinese and Japanese full stops end a sentence by themselves, the others only before white space; a list
# item or an interpreter's prompt begins one.
CANDIDATE = re.compile(
    r"""[。！？][。！？”’」』）】》)]*
      | (?P<stop>(?<![.!?…])[.!?…]+)["'”’)\]}»*_`]*(?=\s)
      | \n(?=[ \t]*(?:[-*+•][ \t]|>>>[ ]|\d{1,3}[.)][ \t]))""",
    re.VERBOSE,
)
SPACE = re.compile(r"\s*")
WORD_BEFORE = re.compile(r"[^\s(\[{\"'“‘]*\Z")
INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]\Z")  # J   e.g   U.S
CONTINUES = re.compile(r"[,;:)\]]")

# Before a name or a clause; before a number.
ABBREVIATION = re.compile(
    "Mr|Mrs|Ms|Messrs|Dr|Prof|St|Mt|Gen|Col|Capt|Lt|Sgt|Cmdr|Rev|Hon|Sen|Rep|Gov|Pres|vs|cf|viz"
)
NUMBERED = re.compile(
    "Nos?|nos?|Figs?|fig|Eq|eq|Sec|sec|Ch|ch|Vol|vol|pp?|Art|art|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec"
)
LONGEST_ABBREVIATION = 16  # characters looked at before a full stop


def paragraph_starts(text: str) -> list[int]:
    """Paragraphs are separated by blank lines, which belong to the paragraph before them."""
    return [0] + [
        match.end() for match in PARAGRAPH_BREAK.finditer(text) if 0 < match.start() < match.end() < len(text)
    ]


def sentence_starts(text: str) -> list[int]:
    """Sentences; every paragraph's start is among them.

    English by full stops, abbreviations and the case of what follows, Chinese and Japanese by their full
    stops. A sentence that opens a line begins with its indentation; any other with the one space before its
    first word, which byte-level BPE makes part of the word.
    """
    starts = set(paragraph_starts(text))
    for match in CANDIDATE.finditer(text):
        space = SPACE.match(text, match.end())
        assert space is not None
        first = space.end()  # of the next sentence, white space aside
        if first == len(text) or (match["stop"] and not _ends_sentence(text, match, first)):
            continue
        line = text.rfind("\n", match.start(), first)
        if line >= 0:
            starts.add(line + 1)
        else:
            starts.add(first - 1 if text[first - 1] == " " else first)
    return sorted(starts)


def _ends_sentence(text: str, match: re.Match[str], first: int) -> bool:
    following = text[first]
    if following.islower() or CONTINUES.match(following):
        return False
    if match["stop"] != ".":
        return True
    stop = match.start()
    word_match = WORD_BEFORE.search(text[max(0, stop - LONGEST_ABBREVIATION) : stop])
    assert word_match is not None
    word = word_match[0]
    if ABBREVIATION.fullmatch(word) or (following.isdigit() and NUMBERED.fullmatch(word)):
        return False
    if word.isdigit():
        # The number of a list item, "1. Install it", opens its line.
        return bool(text[text.rfind("\n", 0, stop) + 1 : stop - len(word)].strip())
    return word == "I" or not INITIALS.match(word)
