r"""Problems that two splits share, by normalised text: what a model trains on it is not scored on.

The normal form drops what two files of one problem usually differ in: case, spaces, the marks of
mathematics ($, \(, \[), TeX's spacing and sizes, and the full stop. It keeps signs and digits.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# The marks of mathematics, spacing, and sizes of brackets. "\\\\" is a row's end and stays.
_LOOSE = re.compile(
    r"(?P<row>\\\\)|\$|\\[()\[\],;:! ]|\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|~|\s+")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_END = re.compile(r"[.?!:]+$")
# Texts of one sign in several fonts, beyond those that Unicode's NFKC unites.
_SIGNS = str.maketrans({"−": "-", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'",
                        "×": "*", "·": "*"})


def normalised(text: str) -> str:
  """A problem's text in its normal form; normalising twice changes nothing."""
  text = unicodedata.normalize("NFKC", text).translate(_SIGNS).casefold()
  text = _FRACTION.sub(r"\\frac", text)
  text = _LOOSE.sub(lambda found: found["row"] or "", text)
  return _END.sub("", text)


def shared(labelled: Iterable[Mapping[str, Any]],
           scored: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The rows of a scored split whose problem stands among the labelled ones."""
  texts = {normalised(row["problem"]) for row in labelled}
  return [row for row in scored if normalised(row["problem"]) in texts]
