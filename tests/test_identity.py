"""A function's name for a hash: equal in every process, and another where its meaning changes."""

import dataclasses
import functools
import inspect
import json
import operator
from typing import NamedTuple

import numpy as np
import pytest

from s2d_jax.identity import identity_of
from s2d_jax.rewards import arithmetic


def reward(scale, problem, text=""):
  return scale


def other(x):
  return x


class Stateless:
  def __call__(self, problem, text):
    return 1.0


class Stateful:
  def __init__(self, scale):
    self.scale = scale

  def __call__(self, problem, text):
    return self.scale

  def method(self, problem, text):
    return self.scale


class Slotted:
  __slots__ = ("scale",)

  def __init__(self, scale):
    self.scale = scale

  def __call__(self, problem, text):
    return self.scale


class Table(dict):
  def __call__(self, problem, text):
    return self[text]


class Point(NamedTuple):
  x: float
  y: object = None

  def __call__(self, problem, text):
    return self.x

  def method(self, problem, text):
    return self.x


@dataclasses.dataclass(frozen=True)
class Frozen:
  x: float
  hidden: object = dataclasses.field(default=None, repr=False)

  def __call__(self, problem, text):
    return self.x


@dataclasses.dataclass
class Mutable:
  x: float


# The values whose `repr` was in the hash before: those hashes stay.
@pytest.mark.parametrize("value, text", [
    (None, "None"), (True, "True"), (3, "3"), (0.1, "0.1"), ("a'b", '"a\'b"'), (b"a", "b'a'"),
    ((), "()"), ((1,), "(1,)"), ((1, "a"), "(1, 'a')"), ([1, [2]], "[1, [2]]"),
    ({"b": 1, "a": (2,)}, "{'b': 1, 'a': (2,)}"), (Point(1.0, [2]), "Point(x=1.0, y=[2])"),
    (int, "<class 'int'>"), (np.sqrt, "<ufunc 'sqrt'>"),
])
def test_a_plain_argument_is_its_repr(value, text):
  assert repr(value) == text
  found = identity_of(functools.partial(reward, value, text=value))
  assert found == [[__name__, "reward", inspect.getsource(reward)], f"({text},)",
                   f"[('text', {text})]"]


def test_a_function_of_ours_keeps_its_version():
  assert identity_of(arithmetic.reward) == ["s2d_jax.rewards.arithmetic", "reward", 1]


@pytest.mark.parametrize("one, two", [
    # Both beyond what `repr` shows of an array.
    (np.zeros(5000), np.zeros(5000) + 1e-12 * (np.arange(5000) == 2500)),
    (np.float32([1]), np.float64([1])), (np.zeros((2, 3)), np.zeros((3, 2))),
    (Frozen(1.0), Frozen(2.0)), (Frozen(1.0, hidden=1), Frozen(1.0, hidden=2)),
    (other, reward), (functools.partial(other, 1), functools.partial(other, 2)),
    ({"f": [other]}, {"f": [reward]}), (Stateless(), Point(1.0)), ({1: 2}.get, {1: 3}.get),
])
def test_other_arguments_are_another_function(one, two):
  found = [json.dumps(identity_of(functools.partial(reward, value))) for value in (one, two)]
  assert found[0] != found[1]
  assert " at 0x" not in "".join(found)


def test_equal_arguments_are_an_equal_function():
  one, two = (functools.partial(reward, [np.arange(3.0), Frozen(1.0), other]) for _ in range(2))
  assert identity_of(one) == identity_of(two)
  assert json.dumps(inspect.getsource(other)) in identity_of(one)[1]


def test_a_callable_object_is_its_class_and_its_value():
  # An object without state is its class alone, as before.
  assert identity_of(Stateless()) == [__name__, "Stateless", inspect.getsource(Stateless)]
  assert identity_of(Frozen(1.0)) == [
      __name__, "Frozen", inspect.getsource(Frozen), "Frozen(x=1.0, hidden=None)"]
  assert identity_of(Point(1.0)) != identity_of(Point(2.0))
  assert identity_of(Point(1.0).method) != identity_of(Point(2.0).method)
  assert identity_of(np.sqrt) != identity_of(np.exp)


@pytest.mark.parametrize("function, owner, kind", [
    (functools.partial(reward, object()), "reward", "builtins.object"),
    (functools.partial(reward, text={1: [object()]}), "reward", "builtins.object"),
    # The order of a set differs between processes.
    (functools.partial(reward, {"a", "b"}), "reward", "builtins.set"),
    (functools.partial(reward, np.array([object()])), "reward", "numpy.ndarray"),
    (functools.partial(reward, Mutable(1.0)), "reward", f"{__name__}.Mutable"),
    (functools.partial(reward, Point(1.0, object())), "reward", "builtins.object"),
    (functools.partial(reward, Stateful(1.0)), "Stateful", f"{__name__}.Stateful"),
    (Stateful(1.0), "Stateful", f"{__name__}.Stateful"),
    (Stateful(1.0).method, "Stateful.method", f"{__name__}.Stateful"),
    (Slotted(1.0), "Slotted", f"{__name__}.Slotted"),
    (Table(a=1.0), "Table", f"{__name__}.Table"),
    (operator.itemgetter("answer"), "itemgetter", "operator.itemgetter"),
])
def test_a_value_without_a_stable_text_is_refused(function, owner, kind):
  with pytest.raises(ValueError, match=f"{owner} carries a {kind}, which has no text that is equal "
                                       "in every process.*: make it a number, text, array"):
    identity_of(function)
