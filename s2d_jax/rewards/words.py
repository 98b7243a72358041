"""English words behind a number: which are nouns that were counted, and which change its value.

"12 students" is 12. "7 twelfths", "5 dozen" and "3 more" are other values than 7, 5 and 3.
"""

import re
from collections.abc import Sequence

_CARDINALS = """zero one two three four five six seven eight nine ten eleven twelve thirteen
  fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
  eighty ninety""".split()
_TENS = "twenties thirties forties fifties sixties seventies eighties nineties".split()
# Words that scale the number before them, say something of it or add an alternative.
_NOT_NOUNS = frozenset(
  """
  sixes hundred hundreds thousand thousands dozen dozens half halves halfs third thirds quarter
  quarters score scores gross grosses myriad myriads googol googols lakh lakhs crore crores grand
  grands mil mils bil bils mill mills bps basis permille
  pair pairs couple couples triplet triplets tuple tuples double doubles doubled triple triples
  tripled quadruple quadruples quintuple quintuples multiple multiples twice thrice halved
  squared cubed root power powers exponent exponents factorial factorials log logs logarithm
  logarithms reciprocal reciprocals inverse inverses opposite opposites magnitude magnitudes
  zeros zeroes negative negatives positive positives minus plus modulo mod divided multiplied
  added subtracted base remainder remainders percentile percentiles percents
  and but not nor for except excluding including with without through from above below over under
  before after until since within beyond between among off out down than
  more less most least fewer greater larger smaller extra additional short shy further later earlier
  longer younger older about around approximately roughly nearly almost
  if when where because then who which that are was were has have does is equals
  all any some both either neither none never always every odd odds even evens prime false true
  wrong infinity undefined impossible unknown north south east west
  """.split()) | {*_CARDINALS, *(word + "s" for word in _CARDINALS), *_TENS}
# "twelfths", "zeroths" and "trillions": names of parts and powers of ten, of which there is no end.
_NUMBER_ENDINGS = ("th", "ths", "illion", "illions", "fold")
_NOUNS_IN_TH = frozenset(
  """
  month months path paths moth moths cloth cloths booth booths bath baths birth births death deaths
  length lengths width widths depth depths youth youths mouth mouths myth myths truth truths
  breath breaths wreath wreaths hearth hearths mammoth mammoths sloth sloths tooth growth
  blacksmith blacksmiths goldsmith goldsmiths locksmith locksmiths
  """.split())
# Adjectives that say which things were counted, where the noun follows them.
ADJECTIVES = frozenset({"even", "odd", "prime"})
# "Three-digit numbers" are counted; "three numbers" behind a number says nothing certain.
SIZES = frozenset(_CARDINALS[2:10])
OF_SIZE = frozenset({"digit", "letter", "element", "sided"})
# Behind "ordered" they name what was counted; alone they may scale.
TUPLES = frozenset({"pair", "pairs", "triple", "triples", "quadruple", "quadruples", "tuples",
                    "triplets"})
_PLURALS = frozenset({"people", "men", "women", "children", "geese", "mice", "teeth", "sheep",
                      "fish", "deer", "dice", "oxen"})
_NOT_PLURAL = ("ss", "us", "is")
_NOUN = re.compile(r"[a-z]{3,}")
_VOWELS = frozenset("aeiouy")


def is_noun(word: str) -> bool:
  """Whether a word may be a noun; one without a vowel is an abbreviation."""
  if word in _NOT_NOUNS or word.endswith(_NUMBER_ENDINGS) and word not in _NOUNS_IN_TH:
    return False
  return _NOUN.fullmatch(word) is not None and not _VOWELS.isdisjoint(word)


def is_plural(word: str) -> bool:
  """Whether a word may be a noun in the plural."""
  return is_noun(word) and (
    word in _PLURALS or word[-1] == "s" and not word.endswith(_NOT_PLURAL))


def is_counted(pieces: Sequence[str], k: int) -> bool:
  """Whether a piece of the text behind a number says which things were counted.

  It is a noun, or the word before one in "ordered pairs", "odd numbers" or "three-digit numbers".
  """
  word = pieces[k]
  following = pieces[k + 1 : k + 2]
  if word in TUPLES:
    return k > 0 and pieces[k - 1] in ("ordered", "unordered")
  if word in SIZES:
    return len(pieces) > k + 2 and following[0] in OF_SIZE
  return is_noun(word) or word in ADJECTIVES and bool(following)
