r"""Kinds of answers that a checker may confuse, with the verdicts of both checkers.

"algebra" marks answers that are equal by math-verify alone.
"""

import json
import pathlib

import numpy as np
import pytest

from s2d_jax import rollouts
from s2d_jax.rewards import math

# Of each kind: an answer, what is in the box, and the verdict.
KINDS = {
  "digits in a text are read as outside it": [
    ("\\frac{3}{2}", "\\text{1 1/2}", 1), ("\\frac{11}{2}", "\\text{1 1/2}", 0),
    ("12", "\\text{1 2}", 0), ("12", "\\mathrm{1\\ 2}", 0), ("1000", "\\text{1 000}", 1),
    ("12345", "\\mbox{12,345}", 1), ("31/2", "\\textbf{3 1/2}", 0), ("2, 5", "\\text{2, 5}", 1),
    ("25", "\\text{2, 5}", 0), ("5, 6", "\\text{5 or 6}", 1), ("53/8", "\\text{5 }\\frac38", 0),
    ("43/8", "\\text{5 3/8 inches}", 1), ("530", "\\text{5:30}", 0), ("5", "\\text{x = 5}", 1),
    ("7", "\\text{7 cm}", 1), ("\\text{7 cm}", "7", 1), ("0.5", "\\text{.5}", 1),
  ],
  "names that differ say which value is whose": [
    ("x=1, y=2", "x=2, y=1", 0), ("x=1, y=2", "y=2, x=1", 1), ("x=1, y=2", "y=1,x=2", 0),
    ("x=1, y=2", "x=1\\text{ and }y=2", 1), ("x=1, y=2", "x=1\\text{ or }y=2", 0),
    ("a=3, b=4, c=5", "c=3, b=4, a=5", 0), ("a=3, b=4, c=5", "c=5, a=3, b=4", 1),
    ("x_1=2, x_2=3", "x_1=3, x_2=2", 0), ("\\alpha=30, \\beta=60", "\\alpha=60, \\beta=30", 0),
    ("x=1, y=2", "x=1, z=2", 0), ("x=1, y=2", "1, 2", 1), ("x=1, y=2", "2, 1", 0),
    ("x=1, x=2", "2, 1", 1), ("x=1, x=2", "x=2, x=1", 1), ("(1,2)", "(x,y)=(1,2)", 1),
    ("(1,2)", "(x,y)=(2,1)", 0), ("(1,2)", "(y=1,x=2)", 0), ("(x,y)=(1,2)", "(y,x)=(1,2)", 0),
    ("\\text{Al}=3, \\text{Bo}=4", "\\text{Al}=4, \\text{Bo}=3", 0), ("a=1, b=2", "A=1, B=2", 0),
    ("a=1, b=2", "a=\\sqrt{1}, b=2", "algebra"), ("a=1, b=2", "b=\\sqrt{1}, a=2", 0),
  ],
  "the value of a function": [
    ("5", "f(2)=5", 1), ("5", "f(-1) = 5", 1), ("5", "f(\\frac12)=5", 1), ("5", "f^{-1}(2)=5", 1),
    ("5", "f''(0)=5", 1), ("5", "g(2,3)=5", 1), ("3/4", "P(X=3)=\\frac34", 1),
    ("1/6", "P(A \\cap B)=\\frac16", 1), ("5", "\\angle ABC=5", 1), ("5", "[ABC]=5", 1),
    ("5", "\\text{The area} = 5", 1), ("2", "f(2)=5", 0), ("5", "f(5)=2", 0),
    ("f(2)=5", "f(3)=5", 0), ("5", "x(2)=5", 0), ("5", "\\sin(2)=5", 0), ("5", "2x=5", 0),
  ],
  "words behind a number that are no unit": [
    ("5", f"5\\text{{{words}}}", 0) for words in (
      "M", "K", " k", " bn", "e", "x", "B", " mil", " tens", " lakhs", " pairs", " short of ten",
      " percent more", " thousandths", " choose two", " remainder two", " factorial", " plus",
      " apples less than before", " or more students", " and a half hours", " hundred dollars",
      " below zero", " dozen apples", " feet shorter", " to the fourth")
  ] + [
    ("5", "5\\text{ kbps}", 0), ("5", "5\\text{ zeros}", 0),
    ("3", "3\\text{ over}", 0), ("3", "3\\text{ over }4", 0), ("5", "\\$5\\text{M}", 0),
    ("5", "\\$5\\text{ million}", 0), ("5", "5L", 0), ("4", "4\\text{ positive integers}", 0),
  ],
  "what was counted": [
    ("12", "12\\text{ students}", 1), ("12\\text{ students}", "12", 1), ("12", "12 students", 1),
    ("24", "24\\text{ distinct ways}", 1), ("7", "7\\text{ people}", 1),
    ("1", "1\\text{ solution}", 1), ("\\frac12", "\\frac12\\text{ pizza}", 1),
    ("3", "3\\text{ apples left}", 1), ("35", "35\\text{ pages per hour}", 1),
    ("12\\text{ students}", "13\\text{ students}", 0), ("2", "2\\text{ cups of flour}", 1),
  ],
  "known units differ with their powers": [
    ("5\\text{ cm}^2", "5\\text{ cm}", 0), ("5\\text{ cm}^3", "5\\text{ cm}^2", 0),
    ("5\\text{ square meters}", "5\\text{ meters}", 0), ("5\\text{ m/s}", "5\\text{ m}", 0),
    ("5\\text{ m/s}", "5\\text{ s/m}", 0), ("5\\text{ m/s}^2", "5\\text{ m/s}", 0),
    ("5\\text{ m/s}^2", "5\\text{ m s}^{-2}", 1), ("5\\text{ sq ft}", "5\\text{ ft}^2", 1),
    ("5\\text{ square feet}", "5\\text{ feet squared}", 1), ("5", "5\\text{ cm}^2", 1),
    ("5\\text{ cubic inches}", "5\\text{ in}^3", 1), ("5\\text{ cm$^2$}", "5\\text{ cm}^3", 0),
    ("5\\text{ units}", "5\\text{ square units}", 0),
    ("60\\text{ mph}", "60\\text{ miles per hour}", 1),
    ("3\\text{ hours per page}", "3\\text{ pages per hour}", 0),
    ("20^\\circ\\text{C}", "20^\\circ\\text{F}", 0), ("20", "20^\\circ\\text{C}", 1),
    ("5\\text{ nautical miles}", "5\\text{ miles}", 0), ("20", "\\$20\\text{ per hour}", 1),
    ("18", "\\$18/\\text{day}", 1), ("\\$18\\text{ per day}", "\\$18/\\text{week}", 0),
    ("5\\text{ cm}, 3\\text{ m}", "5\\text{ m}, 3\\text{ cm}", 0), ("5 cm, 3 ft", "5 ft, 3 cm", 0),
    ("5\\text{ cm}, 3\\text{ m}", "3\\text{ m}, 5\\text{ cm}", 1),
    ("(3\\text{ m},4\\text{ s})", "(3\\text{ s},4\\text{ m})", 0),
    ("(3\\text{ m},4\\text{ s})", "(3,4)", 1), ("(2,60^\\circ)", "(2,60)", 1),
    ("5\\text{ m}", "\\sqrt{25}\\text{ m}^2", 0),
    ("5\\text{ m}", "\\sqrt{25}\\text{ m}", "algebra"),
    ("x=5\\text{ m}", "x=\\sqrt{25}\\text{ cm}", 0), ("x<5\\text{ m}", "x<5\\text{ cm}", 0),
    ("x<5\\text{ m}", "5>x", "algebra"),
    ("30^\\circ", "\\frac{\\pi}{6}", "algebra"), ("30^\\circ", "30\\text{ radians}", 0),
  ],
  "and is not or between relations": [
    ("x<1\\text{ or }x>3", "x<1\\text{ and }x>3", 0), ("x<1\\text{ or }x>3", "x>3 or x<1", 1),
    ("1<x<3", "1<x\\text{ and }x<3", "algebra"), ("1<x<3", "1<x\\text{ or }x<3", 0),
    ("(-\\infty,1)\\cup(3,\\infty)", "x<1\\text{ or }x>3", "algebra"),
    ("(-\\infty,1)\\cup(3,\\infty)", "x<1\\text{ and }x>3", 0),
    ("(-\\infty,1)\\cup(3,\\infty)", "(-\\infty,1)\\cap(3,\\infty)", 0),
    ("x\\le1\\text{ or }x\\ge3", "(-\\infty,1)\\cup(3,\\infty)", 0),
    ("x\\le1\\text{ or }x\\ge3", "(-\\infty,1]\\cup[3,\\infty)", "algebra"),
    ("x>3", "x>5\\text{ and }x>3", 0), ("x>3", "3<x\\text{ and }5<x", 0),
    ("x=1\\text{ or }x=2", "x=1\\text{ and }x=2", 1), ("1\\text{ or }2", "1, 2", 1),
    ("x\\ne1\\text{ and }x\\ne2", "x\\ne1, x\\ne2", 1), ("a>0, b<0", "a<0, b>0", 0),
    ("a>0\\text{ and }b>0", "b>0\\text{ and }a>0", 1),
    ("a>0\\text{ and }b>0", "a>0\\text{ or }b>0", 0),
    ("3\\text{ m}<x\\text{ and }x<5\\text{ m}", "3\\text{ cm}<x\\text{ and }x<5\\text{ cm}", 0),
    ("x<1\\text{ or }y>3", "x<1\\text{ or }x>3", 0),
    ("(-\\infty,1)\\cup(3,\\infty)", "x<1\\text{ or }y>3", 0),
    ("x\\ne2", "(-\\infty,2)\\cup(2,\\infty)", "algebra"),
  ],
  "and is not or between choices": [
    ("\\text{I and II}", "\\text{I or II}", 0), ("\\text{A and B}", "A, B", 1),
    ("A, B", "B\\text{ or }A", 0), ("A, B", "B\\text{ and }A", 1), ("2, 3", "3\\text{ or }2", 1),
  ],
  "signs that say more than the number before them": [
    ("5", "5'", 0), ("5", "5''", 0), ("5", "5:1", 0), ("5", "5\\dots", 0), ("5", "\\approx 5", 0),
    ("5", "5?", 0), ("20", "\\text{20th}", 0), ("2", "2^{\\text{nd}}", 0),
    ("3:2", "3 : 2", 1), ("3:2", "1.5", 0), ("5", "5\\sim 7", 0),
  ],
  "numerals in words scale the number before them": [
    ("7", f"7\\text{{ {word}}}", 0) for word in (
      "twelfths", "sixteenths", "elevenths", "fifteenths", "twentieths", "fortieths", "trillionths",
      "quadrillions", "twenties", "nineties", "twos", "sixes", "triples", "doubles", "multiples",
      "quadruples", "logs", "factorials", "myriads", "googols", "zeroths", "reciprocals",
      "negatives", "thousandfold", "orders of magnitude", "thirteens", "twelves", "odds",
      "permille")
  ] + [
    ("1", "1\\text{ eleventh}", 0), ("7", "7\\text{ months}", 1), ("7", "7\\text{ paths}", 1),
    ("7", "7\\text{ lengths of rope}", 1), ("7", "7\\text{ parties}", 1),
    ("7", "7\\text{ moths}", 1),
    ("7", "7\\text{ cities}", 1), ("7", "7\\text{ times}", 1), ("7", "7\\text{ medallions}", 1),
  ],
  "words are no products": [
    ("\\text{VI}", "\\text{IV}", 0), ("\\text{XI}", "\\text{IX}", 0), ("XI", "IX", 0),
    ("\\text{on}", "\\text{no}", 0), ("\\text{on}", "no", 0), ("BA", "AB", 0),
    ("\\text{no}", "no", 1),
    ("(1, \\text{on})", "(1, \\text{no})", 0), ("ab", "ba", "algebra"), ("2ab", "2ba", "algebra"),
    ("\\text{A and B}", "\\text{B and A}", 1), ("\\mathrm{ma}", "\\mathrm{am}", 0),
  ],
  "dots say that something follows": [
    ("2,4,6", "2,4,6,...", 0), ("2,4,6", "2,4,6, …", 0), ("3.14", "3.14...", 0), ("0.3", "0.3…", 0),
    ("0.3", "0.3...", 0), ("20", "20...", 0), ("20", "20..", 1), ("20", "20.", 1),
    ("1, 2, \\dots", "1,2,...", 1), ("1+2+\\cdots", "1 + 2 + ...", 1), ("20", "20. . .", 0),
  ],
  "percent and degrees beside a number without a sign": [
    ("0.5", "0.5\\%", 0), ("0.5", "50\\%", "algebra"), ("0.2", "0.2\\%", 0),
    ("0.2", "20\\%", "algebra"),
    ("1", "1\\%", 0), ("1", "100\\%", "algebra"), ("\\frac15", "\\frac15\\%", 0),
    ("20", "20\\%", 1),
    ("100", "100\\%", 1), ("2", "2\\text{ percent}", 1), ("101", "101\\%", 0), ("20\\%", "20", 1),
    ("20\\%", "0.2", "algebra"), ("0.5\\%", "0.5\\%", 1), ("(0.5, 2)", "(0.5\\%, 2\\%)", 0),
    ("\\frac{\\pi}{4}", "\\frac{\\pi}{4}^\\circ", 0), ("\\frac{\\pi}{4}", "45^\\circ", "algebra"),
    ("\\pi", "\\pi\\text{ degrees}", 0), ("45", "45^\\circ", 1), ("2", "2.5\\%", 0),
    ("\\frac{\\pi}{4}", "\\frac{\\pi}{4}\\text{ radians}", 1),
  ],
  "both signs anywhere in an element": [
    ("\\frac{3+\\sqrt5}{2},\\frac{3-\\sqrt5}{2}", "\\frac{3\\pm\\sqrt5}{2}", 1),
    ("\\frac{3\\pm\\sqrt5}{2}", "\\frac{3+\\sqrt5}{2},\\frac{3-\\sqrt5}{2}", 1),
    ("\\frac{3\\pm\\sqrt5}{2}", "x=\\frac{3\\pm\\sqrt{5}}2", 1),
    ("\\frac{3\\pm\\sqrt5}{2}", "\\frac{3+\\sqrt5}{2}", 0),
    ("\\frac{3\\pm\\sqrt5}{2}", "\\frac{5\\pm\\sqrt3}{2}", 0),
    ("2, 0, -2", "0, \\pm 2", 1), ("(2, 1), (-2, 1)", "(\\pm2, 1)", 1), ("4", "\\pm 4", 0),
    ("(2, 1), (-2, -1)", "(\\pm2, \\pm1)", 0), ("\\pm 20", "\\pm 20, 0", 0),
  ],
  "an answer at the end of a chain": [
    ("504", "9\\times8\\times7=504", "algebra"), ("12", "3+9=12", "algebra"),
    ("\\frac12", "\\frac{2}{4}=\\frac12", "algebra"),
    ("\\frac12", "P=\\frac{2}{4}=\\frac12", "algebra"),
    ("\\frac7{20}", "\\frac7{20}=0.35", "algebra"), ("0.35", "\\frac7{20}=35\\%", "algebra"),
    ("12", "\\binom{12}{1}=12", "algebra"), ("\\frac12", "\\cos\\theta=\\frac12", "algebra"),
    ("\\frac12", "\\tan(A+B)=\\frac12", "algebra"), ("12", "f(g(2))=12", "algebra"),
    ("12", "|AB|=12", "algebra"), ("5", "|z|=5", "algebra"), ("12", "m+n=12", "algebra"),
    ("12", "m+n=3+9=12", "algebra"), ("12", "a+b+c=12", "algebra"),
    ("12\\pi", "12\\pi\\approx37.7", "algebra"), ("\\sqrt2", "x=\\sqrt2\\approx 1.414", "algebra"),
    ("12", "3+9=12\\text{ cm}", "algebra"), ("(x-1)(x+1)", "x^2-1=(x-1)(x+1)", "algebra"),
    ("12", "3+8=12", 0), ("12", "2x=12", 0), ("12", "x+1=12", 0), ("12", "x^2=12", 0),
    ("12", "xy=12", 0), ("12", "2m+n=12", 0), ("12", "\\frac{x}{2}=12", 0), ("12", "12=3+8", 0),
    ("12", "m+n=13", 0), ("3", "3=12", 0), ("12", "12\\ne13", 0), ("12", "x<3+9=12", 0),
    ("12\\pi", "12\\pi\\approx38.7", 0), ("37.7", "12\\pi\\approx37.7", 0), ("5", "-x=5", 0),
    ("x+y=5", "x-y=5", 0), ("x+y=5", "5", 0), ("y=5", "x+y=5", 0), ("3", "3\\approx3.4", 0),
    ("12", "3+9=12, 13", 0), ("0.5", "\\sin(2)=0.5", 0), ("12", "m-n=12", 0),
    ("12", "a+a=12", 0), ("12", "a+b+a=12", 0), ("12", "|x|=12", 0), ("12", "5!=120=12", 0),
  ],
  "adjectives before what was counted": [
    ("12", f"12\\text{{ {words}}}", 1) for words in (
      "ordered pairs", "even numbers", "three-digit numbers", "prime factors", "odd primes",
      "real roots", "square roots", "prime numbers", "distinct odd integers", "ordered triples")
  ] + [
    ("12", f"12\\text{{ {words}}}", 0) for words in (
      "even", "odd", "prime", "pairs", "pairs of socks", "triples", "real", "hundred digit",
      "odd thousands", "three", "three-digit", "ordered", "quarters", "prime halves")
  ],
  "spacing and colour": [
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\[4pt]2\\end{pmatrix}", 1),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\ [1ex] 2\\end{pmatrix}", 1),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\cr2\\end{pmatrix}", 1),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\[2]\\end{pmatrix}", 0),
    ("12", "\\begin{array}{c}12\\end{array}", 1), ("12", "\\begin{aligned}x&=12\\end{aligned}", 1),
    ("12", "\\begin{aligned}12\\end{aligned}", 1), ("12", "\\begin{aligned}1&2\\end{aligned}", 0),
    ("336", "\\color{blue}{336}", 1), ("336", "\\color{red}336", 1),
    ("12", "\\textcolor{red}{12}", 1), ("336", "\\large 336", 1), ("336", "\\normalsize 336", 1),
    ("336", "\\underline{336}", 1), ("12", "\\texttt{12}", 1), ("12", "{\\tt 12}", 1),
    ("12", "12\\tag{1}", 1), ("12", "12\\nonumber", 1), ("12", "12\\phantom{0}", 1),
    ("12", "**12**", 1), ("12", "\\cancel{12}", 0), ("24", "**12**2", 0), ("121", "12\\tag{1}", 0),
    ("120", "12\\phantom{0}", 0), ("12", "\\textcolor{12}{13}", 0), ("3**2", "3**2", 1),
  ],
  "money of other countries and units in brackets": [
    ("12", "£12", 1), ("12", "€12.00", 1), ("12", "¥12", 1), ("12", "\\pounds 12", 1),
    ("12", "\\euro 12", 1), ("12", "12¢", 1), ("12", "12\\text{ USD}", 1), ("\\$12", "£12", 0),
    ("12", "12 (\\text{cm})", 1), ("12", "12\\text{ (students)}", 1), ("12", "12\\text{ kWh}", 1),
    ("12", "12\\text{ GB}", 1), ("12", "12\\text{ N}", 1), ("12", "12 (\\text{dozen})", 0),
    ("12\\text{ m}", "12 (\\text{cm})", 0), ("12", "£12\\text{ million}", 0), ("12", "12N", 0),
    ("12", "12GB", 0),
    ("12", "12 (13)", 0), ("£12", "€12", 0), ("12", "12\\text{ (mod 5)}", 0),
  ],
  "a choice with its text": [
    ("B", "\\textbf{(B) }12", 1), ("A", "\\textbf{(A)}\\ 5", 1), ("B", "\\text{B. }12", 1),
    ("B", "\\text{Option B}", 1), ("(B)", "\\text{(B) } 12", 1), ("B", "B) 12", 1),
    ("\\textbf{(B)}", "(B)\\ \\frac12", 1), ("B", "\\text{(B) Monday}", 1),
    ("A", "\\textbf{(B) }12", 0), ("B", "(B)\\text{ or }(C)", 0), ("B", "(B)(C)", 0),
    ("B", "\\text{not (B)}", 0), ("B", "B+1", 0), ("B", "(B)+1", 0), ("B", "B, C", 0),
    ("B", "\\text{B and C}", 0), ("B", "\\text{Option C}", 0), ("B", "\\text{B. or C.}", 0),
    ("B", "BC", 0), ("12", "\\textbf{(B) }12", 0), ("B", "(B)^2", 0), ("B", "B.C", 0),
    ("B", "\\text{(B) is wrong}", 0), ("B", "\\text{Neither A nor B}", 0),
  ],
  "base ten": [
    ("42", "42_{10}", 1), ("42_{10}", "42", 1), ("42", "42_{8}", 0), ("42_{8}", "42", 0),
    ("42", "x_{10}", 0), ("42", "42_{100}", 0), ("-42", "-42_{10}", 1),
  ],
  "fractions by over": [
    ("1/2", "{1 \\over 2}", 1), ("1/2", "1\\over 2", 1), ("2", "{1\\over2}", 0),
    ("\\frac{a+b}{c}", "a+b \\over c", 1), ("\\frac{b}{a}", "a \\over b", 0),
    ("-1/2", "-{1\\over2}", 1), ("x=\\frac12", "x={1\\over 2}", 1), ("1/2, 3", "{1\\over2}, 3", 1),
    ("\\frac{\\sqrt3}{2}", "{\\sqrt3\\over2}", 1), ("1/2", "{1\\over2\\over3}", 0),
    ("\\binom{5}{2}", "{5\\choose2}", 1), ("\\frac{1}{23}", "\\frac123", 0),
  ],
  "a sign of comparison": [
    ("<", "<", 1), ("<", "\\lt", 1), ("<", "\\text{<}", 1), ("<", ">", 0), ("<", "\\le", 0),
    ("=", "=", 1), (">", "$>$", 1), ("=", "x=", 0), ("=", "", 0), ("<", "1<2", 0), ("<", "-", 0),
    ("\\le", "\\leq", 1), ("\\ne", "=", 0),
  ],
  "signs and words that deny are no names": [
    ("5", f"{name}=5", 0) for name in (
      "\\not", "\\neg", "\\notin", "\\nless", "\\times", "\\approx", "\\sim", "\\to", "\\sec",
      "\\ne", "\\text{not}", "\\text{Not}", "\\text{No}", "\\operatorname{not}", "\\text{x is}",
      "\\text{x is less than}", "\\text{at least}", "\\text{at most}", "\\text{cannot be}",
      "\\text{twice the number}", "\\text{different from}", "\\text{larger}", "\\text{x by}",
      "\\text{all except}", "\\text{between}", "\\text{more}", "\\text{minus}",
      "\\text{positive}", "\\text{of positive}", "\\text{negative number}", "\\text{two numbers}")
  ] + [
    ("5", f"{name}=5", 1) for name in (
      "\\ell", "\\hbar", "\\Phi", "\\varepsilon_0", "\\max", "\\gcd(10,15)", "\\overline{AB}",
      "\\triangle ABC", "\\text{Area}", "\\text{Number of ways}", "\\text{Answer}", "\\text{cm}",
      "\\text{The remainder}", "\\text{Larger number}", "\\mathbf{x}", "\\text{Al}",
      "\\text{Pr}(A)", "\\text{lcm}(1,5)", "\\text{Distance from A to B}", "x_{\\text{max}}",
      "\\text{Number of positive divisors}", "\\text{Sum of two numbers}")
  ] + [
    ("5", "\\not{=}5", 0), ("5", "\\cancel{=}5", 0), ("5", "x\\not=5", 0), ("x=5", "x\\not=5", 0),
    ("x\\ne5", "x\\not=5", 1), ("x\\ne5", "x\\not{=}5", 1), ("5", "\\not\\in 5", 0),
    ("\\text{yes}", "\\text{no}=\\text{yes}", 0), ("\\text{red}", "\\text{blue}=\\text{red}", 0),
    ("\\text{red}", "\\text{blue}=red", 0), ("\\text{yes}", "\\text{Answer}=\\text{yes}", 1),
    ("(1,2)", "\\vec{v}=(1,2)", 1), ("(1,2)", "\\vec{v}=(2,1)", 0),
  ],
  "both signs in a set": [
    ("\\{1\\pm\\sqrt{5},-2\\}", "\\{-2,1+\\sqrt5,1-\\sqrt5\\}", 1),
    ("\\{-2,1+\\sqrt5,1-\\sqrt5\\}", "\\{1\\pm\\sqrt{5},-2\\}", 1),
    ("\\{1\\pm\\sqrt{5},-2\\}", "x\\in\\{-2, 1\\pm\\sqrt5\\}", 1),
    ("\\{1\\pm\\sqrt{5},-2\\}", "-2,1\\pm\\sqrt5", 1), ("\\{\\pm20\\}", "\\pm 20", 1),
    ("1\\pm\\sqrt{5},-2", "-2,1+\\sqrt5,1-\\sqrt5", 1),
    ("\\{1\\pm\\sqrt{5},-2\\}", "\\{-2,1+\\sqrt5\\}", 0),
    ("\\{1\\pm\\sqrt{5},-2\\}", "\\{-2,5\\pm\\sqrt1\\}", 0),
    ("\\{1\\pm\\sqrt{5}\\}", "\\{1\\pm\\sqrt{5},-2\\}", 0),
    ("\\{(2,1),(-2,1)\\}", "\\{(\\pm2,1)\\}", 1), ("\\{(2,1),(-2,-1)\\}", "\\{(\\pm2,\\pm1)\\}", 0),
    ("\\{1\\pm\\sqrt2\\pm\\sqrt3\\}", "\\{1\\pm\\sqrt{2}\\pm\\sqrt{3}\\}", 1),
    ("\\{1+2+3,1-2-3\\}", "\\{1\\pm2\\pm3\\}", 0), ("\\{1\\mp2\\}", "\\{3,-1\\}", 0),
    ("\\{x|x=\\pm2,x>y\\}", "\\{x|x=\\pm 2, x>y\\}", 1),
    ("\\{x|x=2,x|x=-2\\}", "\\{x|x=\\pm2\\}", 0), ("\\{1,2\\}", "\\pm\\{1,2\\}", 0),
    ("\\{3,-1\\}", "\\{1\\pm2\\}", "algebra"),
  ],
  "a list and the set of its elements": [
    ("-2,1", "\\{-2,1\\}", 1), ("-2,1", "x\\in\\{1, -2\\}", 1), ("-2,1", "\\{-2,1,1\\}", 1),
    ("\\{-2,1\\}", "-2,1", 1), ("\\{-2,1\\}", "x=-2\\text{ or }x=1", 1),
    ("\\{-20,20\\}", "\\pm20", 1), ("\\pm20", "\\{-20,20\\}", 1), ("\\{1000,2\\}", "1000, 2", 1),
    ("\\{1,2\\}", "1, \\sqrt{4}", "algebra"), ("1,2", "\\{1,\\sqrt4\\}", "algebra"),
    ("(1,2),(3,4)", "\\{(3,4),(1,2)\\}", 1), ("\\{\\text{yes},\\text{no}\\}", "no, yes", 1),
    ("-2,1", "\\{-2,2\\}", 0), ("-2,1", "\\{-2\\}", 0), ("-2,1", "\\{-2,1,3\\}", 0),
    ("\\{-2,1\\}", "-2", 0), ("\\{-2,1\\}", "x=-2\\text{ or }x=2", 0),
    ("-2,1", "x\\notin\\{-2,1\\}", 0), ("-2,1", "\\{-2\\}\\cup\\{1\\}", 0),
    ("(1,2)", "\\{1,2\\}", 0), ("\\{1,2\\}", "(1,2)", 0), ("[1,2]", "\\{1,2\\}", 0),
    ("\\{1,2\\}", "[1,2]", 0), ("(1,2),(3,4)", "\\{(2,1),(3,4)\\}", 0),
    ("x=1, y=2", "\\{1,2\\}", 0), ("\\{1,2\\}", "x=1, y=2", 0), ("1,2", "\\{x=1,y=2\\}", 0),
    ("A, B", "\\{A,B\\}", 1), ("A, B", "\\{A,C\\}", 0),
    ("5", "\\{5\\}", 1), ("5", "x\\in\\{5\\}", 1), ("\\{5\\}", "5", 1), ("\\{5\\}", "x=5", 1),
    ("\\frac12", "\\{0.5\\}", 1), ("\\sqrt2", "\\{\\sqrt2\\}", 1), ("(1,2)", "\\{(1,2)\\}", 1),
    ("5", "\\{6\\}", 0), ("5", "\\{5,6\\}", 0), ("5", "\\{\\}", 0), ("5", "-\\{5\\}", 0),
    ("5", "\\mathbb{R}\\setminus\\{5\\}", 0), ("\\emptyset", "\\{\\emptyset\\}", 0),
    ("\\{\\}", "\\{\\{\\}\\}", 0), ("x", "\\{x\\}", 0), ("\\{x\\}", "x", 0),
    ("x+1", "\\{x+1\\}", 0), ("x>3", "\\{y|x>3\\}", 0),
  ],
  "spaces without width and wide digits": [
    ("5", "5\u200b", 1), ("5", "\ufeff5", 1), ("42", "4\u20602", 1), ("5", "\uff15", 1),
    ("\uff15", "5", 1), ("12345", "\uff11\uff12\uff13\uff14\uff15", 1),
    ("67890", "\uff16\uff17\uff18\uff19\uff10", 1),
    ("\\frac{1}{2}", "\\frac\uff11\uff12", 1), ("5", "\uff16", 0), ("5", "\u200b", 0),
    ("12", "1\u200b 2", 0), ("4", "2\uff12", 0),
  ],
  "expressions that are not evaluated": [
    ("1", text, 0) for text in ("16 \\mod 15", "\\infty-\\infty", "\\frac{1}{0}", "\\log 0",
                                "0^{-1}", "16 \\bmod 15", "\\frac00", "1^\\infty", "\\mod 15")
  ] + [("2", "16 \\mod 15", 0), ("1, 2", "2, 16 \\mod 15", 0), ("(1,2)", "(16\\mod 15, 2)", 0)],
}
ROWS = [(kind, *row) for kind, rows in KINDS.items() for row in rows]


@pytest.mark.parametrize("kind, answer, boxed, verdict", ROWS)
def test_string_match(kind, answer, boxed, verdict):
  assert math.reward({"answer": answer}, f"\\boxed{{{boxed}}}") == (verdict == 1), kind


@pytest.mark.medium
def test_math_verify():
  failures = math.checkers().failures
  begun = [math.submit({"answer": answer}, f"\\boxed{{{boxed}}}") for _, answer, boxed, _ in ROWS]
  wrong = [row for row, reward in zip(ROWS, begun, strict=True)
           if rollouts.resolved(reward) != (row[3] in (1, "algebra"))]
  assert wrong == []
  # A wrong answer is not the failure of a check.
  assert math.checkers().failures == failures


@pytest.mark.medium
def test_a_set_is_refused_where_the_order_of_a_list_counts():
  # (answer, boxed, the reward where the order of a list counts)
  rows = [("-2,1", "\\{-2,1\\}", 0), ("\\{-2,1\\}", "1,-2", 1), ("\\{-2,1\\}", "\\{1,-2\\}", 1),
          ("\\{-2,1\\}", "1,-\\sqrt4", 1), ("5", "\\{5\\}", 1), ("\\{5\\}", "5", 1)]
  found = [math.verified_in_order({"answer": answer}, f"\\boxed{{{boxed}}}")
           for answer, boxed, _ in rows]
  assert found == [row[2] for row in rows]
  assert math.reward_in_order({"answer": "-2,1"}, "\\boxed{\\{-2,1\\}}") == 0.0
  assert math.reward_in_order({"answer": "\\{-2,1\\}"}, "\\boxed{1,-2}") == 1.0


@pytest.mark.parametrize("answer, text, expected", [
  ("5", "\\boxed{\\boxed{5}}", 1), ("5", "\\boxed{ \\boxed{ 5 } }", 1),
  ("5", "\\boxed\\boxed{5}", 1),
  ("\\frac12", "\\boxed\\frac12", 1), ("\\frac12", "$\\boxed\\frac{1}{2}$.", 1),
  ("\\sqrt2", "so \\boxed\\sqrt{2} is it", 1), ("12", "\\boxed\\frac12", 0),
  ("\\text{no solution}", "\\boxed\\text{no solution}", 1), ("x^{2}", "\\boxed x^{2}", 1),
  ("\\{1,2\\}", "\\boxed\\{1,2\\}", 1), ("\\frac12", "\\boxed\\frac{1}{2", 0),
  ("5", "{\\boxed5}", 1), ("5", "\\boxed{5}\\boxed{6}", 0), ("71", "\\boxed{\\boxed{17}}", 0),
])
def test_boxes_without_braces_and_within_boxes(answer, text, expected):
  assert math.reward({"answer": answer}, text) == expected


@pytest.mark.parametrize("ordered", [False, True])
def test_normalising_twice_changes_nothing(ordered):
  for _, answer, boxed, _ in ROWS:
    for text in (answer, boxed):
      once = math.normalised(text, ordered)
      assert math.normalised(once, ordered) == once, text


def rows_of(name):
  path = pathlib.Path(__file__).with_name(f"{name}_answers.jsonl")
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["held_out", "fresh"])
def test_a_set_is_half_wrong_in_each_category(name):
  labels = {}
  for row in rows_of(name):
    labels.setdefault(row["category"], []).append(row["equal"])
  assert len(labels) >= 15
  assert {np.mean(equal) for equal in labels.values()} == {0.5}


@pytest.mark.medium
@pytest.mark.parametrize("name", ["held_out", "fresh"])
def test_verify_agrees_with_a_set_and_no_checker_accepts_a_wrong_answer(name):
  rows = rows_of(name)
  begun = [math.submit(row, row["response"]) for row in rows]
  assert [row for row, reward in zip(rows, begun, strict=True)
          if rollouts.resolved(reward) != row["equal"] or
          not row["equal"] and math.reward(row, row["response"])] == []


@pytest.mark.medium
def test_numbers_that_differ_do_not_reach_math_verify():
  # (answer, boxed, whether math-verify is asked)
  rows = [("42", "24", False), ("\\frac12", "\\frac13", False), ("1000", "1,001", False),
          ("x=5", "6", False), ("5\\text{ m}", "6\\text{ cm}", False), ("1/2", "2/4", True),
          ("1", "100\\%", True), ("0.5", "50\\%", True), ("5", "5^2", True), ("4", "\\pm 4", False),
          ("1/0", "2", True), ("180", "\\pi", True), ("1" * 30, "2" * 30, True)]
  begun = [math.submit({"answer": answer}, f"\\boxed{{{boxed}}}") for answer, boxed, _ in rows]
  assert [not isinstance(reward, float) for reward in begun] == [row[2] for row in rows]
  # Its verdicts are the same.
  verdicts = [math.checkers().submit({"answer": answer, "ordered": False}, boxed)
          for answer, boxed, _ in rows]
  assert [rollouts.resolved(x) for x in begun] == [rollouts.resolved(x) for x in verdicts]
