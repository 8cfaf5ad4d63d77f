"""Splits captions into words as COCO's evaluation does: Penn Treebank tokens, no punctuation.

COCO's server (1504.00325, section 3.1) and pycocoevalcap run Stanford's PTBTokenizer 3.4.1, a Java
program, and drop what is punctuation alone. The rules here were found by trying that program on
captions, prose and every character of 16 bits; `tests/metrics/ptb.json` holds what it answers. The
longest match of any rule wins, then the first.
"""

import re
from string import ascii_lowercase

from vlm.metrics.ptb_characters import FIRST, LETTER, LETTER_OR_DIGIT, NEXT, SYMBOLS

_END = f"(?!{LETTER_OR_DIGIT})"
_QUOTE = "(?:['\u2019\x92]|&apos;)"
_ANY_QUOTE = "(?:['\u2019\u2018`\x91\x92]|&apos;)"
_SUFFIX = f"{_QUOTE}(?i:s|m|d|ll|re|ve)(?![A-Za-z])"
_SLURRED = f"{_QUOTE}(?i:n|em){_END}"
_NOT = f"[nN]{_ANY_QUOTE}[tT]{_END}"
_WORD = f"{FIRST}{NEXT}*"
_HYPHENED = (
    f"{LETTER_OR_DIGIT}(?:{NEXT}|[.,])*"
    f"(?:-(?:[A-Za-z](?:\\.[A-Za-z])+\\.|[dDlLoO]{_QUOTE}{NEXT}+|{NEXT}+))+"
)
_UNDERSCORED = f"{LETTER_OR_DIGIT}{NEXT}*(?:[-_]{NEXT}+)+"
_PATH = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_NUMBER = "(?:[.,:\u066b\u066c]?\\d)+"
_LABEL = "[^\\s\"`'<>|.!?(){}\\[\\],_$@/:;&#-]+"  # of a host's name
_REST = r'(?:/[^\s"<>|(){}]*[^\s"<>|.!?(){},-])?'  # of an address

_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros
calif capt cf cie cmdr co col colo conn corp cos cpl ct dak dec dept det dr drs ed.d elec ens esq
est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky
lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev
nov oct okla penn pfc ph ph.d plc ppte ppty pres prof profs pte ptes pty ptys pvt rd rep reps rev rt
sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues univ
va vs vt wed wis wisc wm wyo
"""
_CAPITALISED = "ark az del ill la mass miss ore pa tex wash"  # else they are words
_BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"
_STARTERS = """
a about according additionally after an as at but earlier he her here however if in it last many
more now once one other our she since so some such that the their then there these they this we what
when while yet you
"""  # of a sentence: a letter and a full stop before one of them is no initial
_APOSTROPHED = (  # words with one inside
    f"[dln]{_QUOTE}{FIRST}{{2,}}",  # d'you, l'eau
    f"o{_QUOTE}{FIRST}{{2,}}|o[\u2019'`]clock|o{_QUOTE}o",
    f"[a-z]+[aeiouy]{_QUOTE}(?:[aeiou]|(?-i:[A-Z])){LETTER}*",  # ma'am, hawai'i, To'Hajiilee
    *(word.replace("'", _QUOTE) for word in ("s'pore", "cap'ns?", "ev'ry", "c'mon", "c'est")),
    *(
        word.replace("'", _QUOTE)
        for word in ("li'l", "nat'l", "qu'il", "e'er", "dunkin'", "somethin'")
    ),
    *(word.replace("'", _QUOTE) for word in ("ol'(?!\\w)", "[djly]'")),
)


def _any_of(words: str) -> str:
    return "|".join(re.escape(word) for word in sorted(words.split(), key=len, reverse=True))


def _capital(words: str) -> str:
    return "|".join(f"{word[0].upper()}(?i:{word[1:]})" for word in words.split())


# A rule's group is the token; what it matches beyond that must follow.
_RULES = (
    # addresses, names, tags, faces
    r"(</?[A-Za-z][\w.:-]*(?:\s+[A-Za-z][\w.:-]*(?:=\"[^\"]*\"|='[^']*')?)*\s*/?>|<!--.*?-->)",
    r'(https?://[^\s"<>|(){}]+[^\s"<>|.!?(){},-])',
    f"((?i:(?:{_LABEL}\\.)+(?:com|net|org|edu)(?![A-Za-z0-9])){_REST})",
    f"((?i:www\\.(?:{_LABEL}(?:[-_]+{_LABEL})*\\.)+[a-z]{{2,4}}){_REST})",
    r'(<?[A-Za-z0-9][^\s"<>|()]*@(?:[^\s"<>|(){}.]+\.)*[^\s"<>|(){}.]+>?)',
    rf"(@[A-Za-z_][A-Za-z_0-9]*|\#{FIRST}+)",
    rf"([<>]?[:;=][-*o']?[()DPdpO@|\\\[\]{{]{_END})",
    r"(\^_\^|-_-|<_<|>_>|\(\^_?\^\)|\(-_-\))",
    r"(&[A-Za-z](?:acute|grave|uml|circ|tilde|cedil);|&#\d+;|&(?:amp|lt|gt|quot|nbsp|[mn]dash);)",
    # apostrophes
    f"((?:'|&apos;)[tT])(?i:is|was)(?:{_END}|(?=n{_QUOTE}t))",
    f"({_QUOTE}(?i:em|till?|cause)|{_QUOTE}[nN]{_QUOTE}|{_QUOTE}[2-9]0s{_END})",
    rf"({_QUOTE}\d\d)(?=\s)",
    f"({_SUFFIX})",
    f"({_NOT})",
    f"({_WORD}){_SUFFIX}",
    f"({FIRST}{NEXT}*?)[nN]{_ANY_QUOTE}[tT]",
    f"((?i:{'|'.join(_APOSTROPHED)}))",
    f"({_SLURRED})",
    f"({_WORD}){_SLURRED}",
    r"(?i:(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na)",
    # numbers
    r"(\([0-9]{2,3}\)[ \xa0]?[0-9]{3,4}[- \xa0]?[0-9]{3,4})",
    r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
    r"((?:\d{1,4}-)?\d{1,4}/\d{1,4})",
    rf"([-+]?{_NUMBER}(?:\u2044\d+)?)",
    r"(v?\d+(?:\.\d+)*\.[xX])",
    # words
    rf"({_WORD}(?:[.!?]{LETTER}{NEXT}*)*)",
    f"({LETTER_OR_DIGIT}{NEXT}*)",
    f"({_HYPHENED})",
    f"({_UNDERSCORED})",
    f"({_PATH}(?:/{_PATH}){{1,2}})",
    r"((?:[A-Za-z]\.)+)",
    rf"([A-Za-z])\.\s+(?:{_capital(_STARTERS)}|M[rs]\.)\s",
    rf"((?i:{_any_of(_ABBREVIATIONS)})\.|(?:{_capital(_CAPITALISED)})\.)",
    rf"((?i:{_any_of(_BEFORE_NUMBERS)})\.)(?=\s?\d)",
    rf"((?:{_WORD}(?:[.!?]{LETTER}{NEXT}*)*|{_HYPHENED}|{_NUMBER})\.)[,;:]",
    r"([A-Z]+&[A-Z]+)",
    r"([A-Z]{1,2}\$)",
    r"((?i:c\+\+|[cf]\#))",
    # the rest
    r"(''|``|[!?]+|\*+|_+|@+|\#+|-+|\.{3}|<<|>>)",
    rf"([\x21-\x7e\x80\x91-\x97\u2013-\u2015«»\u2039\u203a“”\u2018\u2019\u201b€¢£¤\x85…½¼¾⅓⅔{SYMBOLS}])",
)
_MATCHES = tuple(re.compile(rule).match for rule in _RULES)
_PLAIN = re.compile(f"({LETTER}{LETTER_OR_DIGIT}*)(,? |\\. $)")  # most words, without every rule
_SPLIT = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))
_DOTTED = frozenset((_ABBREVIATIONS + _CAPITALISED).split()) | frozenset(ascii_lowercase)
_DASHES = frozenset(("-", "--", "---", "----"))  # more are kept
_PUNCTUATION = _DASHES | {"...", "''", "``", "&quot;", "&nbsp;", "&mdash;", "&ndash;"}
_PUNCTUATION |= frozenset("'`.?!,:;\"…\u2018\u2019\u201b\u2039\u203a“”«»\u2013—―")
_PUNCTUATION |= frozenset("\x85\x91\x92\x93\x94\x96\x97")
_WRITTEN = {
    **{"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"£": "#", "€": "$", "\x80": "$", "¤": "$", "¢": "cents"},
    **{"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">"},
}
_SHORT_FORM = re.compile("^(?:\u2019|\x92|&apos;)(?=(?:s|m|d|ll|re|ve)$)")
_SHORT_NOT = {f"n{quote}t": "n't" for quote in ("\u2019", "\x92", "&apos;")}
_SHORT_NOT |= {f"n{quote}t": "n`t" for quote in "\u2018\x91"}


def tokenize(caption: str) -> list[str]:
    """The words of a caption, in lower case.

    "isn't" is two words, "black-and-white" one; brackets become `-lrb-`, pounds `#`, as there. Not
    followed: letters that Unicode knows since about 2010, telephone numbers of other shapes, and
    the next caption, at whose first character Stanford's program may look.
    """
    text = caption + " "  # what ends a word needs to follow it
    tokens: list[str] = []
    place = 0
    while place < len(text):
        plain = _PLAIN.match(text, place)
        if plain and not _is_special(plain[1].lower(), plain[2]):
            tokens.append(plain[1].lower())
            place = plain.end()
            continue
        matches = (found for match in _MATCHES if (found := match(text, place)))
        found = max(matches, key=re.Match.end, default=None)
        if found is None:
            place += 1  # a space, or what Stanford's program leaves out
            continue
        place = found.end(found.lastindex or 1)
        tokens += _written(found[found.lastindex or 1])
    return tokens


def _is_special(word: str, following: str) -> bool:
    return word in _SPLIT or (following == ". " and word in _DOTTED)


def _written(token: str) -> list[str]:
    """How a token is spelled; none for punctuation."""
    token = token.replace("\xad", "").lower()
    if token in _PUNCTUATION:
        return []
    token = _SHORT_NOT.get(token, _SHORT_FORM.sub("'", token))
    token = _WRITTEN.get(token, token)
    return token.replace("(", "-lrb-").replace(")", "-rrb-").split()
