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
# Words that say that the answer follows them.
ANNOUNCING = frozenset({"the", "final", "answer", "result", "solution", "conclusion"})
# Of a name before "=": words between its nouns, that say of what it is.
_LINKS = frozenset("of in at on by per to the a an and for from with its his her their".split())
# Behind a number they change it, and before "=" they name a value.
_VALUES = frozenset(
  """
  remainder remainders base power powers exponent exponents magnitude logarithm factorial
  pair pairs couple couples triple triples score scores quarter quarters multiple multiples
  inverse reciprocal zeros zeroes percents percentile
  lcm gcd gcf hcf tr rk avg
  """.split())
# Before a noun they say which of several values it is.
_WHICH = frozenset({"smaller", "larger", "longer", "shorter", "older", "younger", "even", "odd",
                    "prime", "third", "fourth", "fifth"})
# So do these behind "of": the number of positive divisors, the sum of two numbers.
_WHICH_OF = _WHICH | SIZES | {"two", "positive", "negative", "all", "both"}
# Before "=" they deny the value, or doubt it.
_DENYING = frozenset(
  """
  no nope cannot cant incorrect invalid unequal unlike differs different differ exceeds exceed
  exceeding approx maybe perhaps possibly probably likely unlikely might may can could would should
  will must nothing nobody nowhere guess estimate estimated bound unless instead rather only
  extraneous rejected excluded forbidden discarded lacks missing other another opposed counter
  contrary contradiction error mistake untrue fails failed nonzero non bigger higher lower
  sometimes rarely seldom hardly barely outside against versus assume assumed suppose supposed given
  ignore omit avoid absent negation doubling tripling halving lessthan morethan greaterthan notequal
  equal been being let had became becomes be
  """.split())
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


def is_name(phrase: Sequence[str]) -> bool:
  """Whether words before "=" name a value: Area, Number of ways, Al, x.

  A word that denies, compares or scales makes another statement, as in "x is less than".
  """
  if phrase[-1].lower() in _LINKS - {"a"} or len(phrase) > 1 and phrase[-1] == "a":
    return False
  small = [word.lower() for word in phrase]
  return all(word in _LINKS or _names_value(phrase[k]) or _says_which(small, k)
             for k, word in enumerate(small))


def _says_which(small: Sequence[str], k: int) -> bool:
  """Whether a word of a name says which of several values the noun behind it has."""
  allowed = _WHICH_OF if k and small[k - 1] == "of" else _WHICH
  return small[k] in allowed and is_noun("".join(small[k + 1 : k + 2]))


def _names_value(word: str) -> bool:
  """Whether a word of a name is a noun, an abbreviation in capitals or a short proper name."""
  small = word.lower()
  if small in _VALUES:
    return True
  if small in _NOT_NOUNS or small in _DENYING:
    return False
  if len(word) == 1 or word.isupper() and len(word) < 5:
    return True
  return is_noun(small) or len(word) == 2 and word[0].isupper()


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
