"""A chat template as a program: the arguments that it reads, and those that it would misread.

A template is Jinja text of a model's folder. `chat` renders it; this file only reads its syntax.
"""

import traceback
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes, parser

from s2d_jax.errors import InputError

CLOCK = "strftime_now"  # transformers' function by which a template asks for the date
# Names that rendering supplies: an argument of this name would replace what it supplies.
_SUPPLIED = {"messages", "add_generation_prompt", "raise_exception", CLOCK}
_BOOLEAN_TESTS = ("true", "false", "boolean")
_SPELLED = ("true", "false", "none", "null")  # texts that a template takes for true


class _Generation(ext.Extension):
  """The tag {% generation %}, by which published templates mark the assistant's text."""
  tags = {"generation"}

  def parse(self, parser: parser.Parser) -> list[nodes.Node]:
    """The statements between the tags; the tags themselves print nothing."""
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_ENVIRONMENT = jinja2.Environment(trim_blocks=True, lstrip_blocks=True,
                                  extensions=[_Generation, ext.loopcontrols])


class Template:
  """The syntax of one chat template.

  Args:
    text: of the template.
    source: names the template in error messages.

  Raises:
    InputError: the text is empty, is not a template, or has an element of chance.
  """

  def __init__(self, text: str, source: str) -> None:
    self.source = source
    if not text.strip():
      raise InputError(f"{source} is empty, so every prompt would be: download it again.")
    try:
      self._tree = _ENVIRONMENT.parse(text)
      names = meta.find_undeclared_variables(self._tree)
      # Python has limits of its own, such as twenty loops in each other.
      _ENVIRONMENT.compile(self._tree)
    except jinja2.TemplateSyntaxError as error:
      raise InputError(f"{source} is not a template (line {error.lineno}: {error.message}): "
                       "correct it, or download it again.") from error
    except (RecursionError, SyntaxError, MemoryError) as error:
      raise InputError(f"{source} is nested too deeply: download it again.") from error
    self.asks_for_date = CLOCK in names
    self.arguments = tuple(sorted(names - _SUPPLIED - self._local_names()))
    # A prompt is a function of the folder, the arguments and the messages.
    if any(_is_random(node) for node in self._tree.find_all((nodes.Filter, nodes.Name))):
      raise InputError(f"{source} draws at random (lipsum, random), so no prompt would repeat: "
                       "take that out of it.")

  def check(self, arguments: Mapping[str, Any]) -> None:
    """Refuses arguments that the template does not read, or that it would take for others.

    A text that spells a boolean or null counts as true in a template's tests. It is refused unless
    the template itself holds that text. An argument that is tested as a boolean must be one.
    """
    texts = {node.value for node in self._tree.find_all(nodes.Const)
             if isinstance(node.value, str)}
    tested = self._tested_as_booleans()
    for name, value in arguments.items():
      if name not in self.arguments:
        choice = f"choose from {', '.join(self.arguments)}" if self.arguments else "it reads none"
        raise InputError(f"{self.source} does not read the argument {name!r}: remove it, or "
                         f"correct its name ({choice}).")
      spelled = (isinstance(value, str) and value.strip().lower() in _SPELLED
                 and value not in texts)
      if spelled or (name in tested and not isinstance(value, bool)):
        raise InputError(f"the argument {name!r} of {self.source} is {value!r} and is tested as a "
                         "boolean: write true or false, without quotes.")

  def _local_names(self) -> set[str]:
    """The names that the template sets itself without asking whether they are there."""
    assigned = {assign.target.name for assign in self._tree.find_all(nodes.Assign)
                if isinstance(assign.target, nodes.Name)}
    # An argument that has a default is set as well, where the template finds it absent.
    absent = [test.node for test in self._tree.find_all(nodes.Test)
              if test.name in ("defined", "undefined", "none")]
    absent += [call.node for call in self._tree.find_all(nodes.Filter)
               if call.name in ("default", "d")]
    return assigned - {node.name for node in absent if isinstance(node, nodes.Name)}

  def _tested_as_booleans(self) -> set[str]:
    """The names in `x is false`, `x == false` and their like."""
    tests = [test.node for test in self._tree.find_all(nodes.Test) if test.name in _BOOLEAN_TESTS]
    for compare in self._tree.find_all(nodes.Compare):
      sides = [compare.expr, *(operand.expr for operand in compare.ops)]
      if any(isinstance(side, nodes.Const) and isinstance(side.value, bool) for side in sides):
        tests += sides
    # find_all leaves the node itself out; a name with a default is beneath a filter.
    names = [name for test in tests for name in test.find_all(nodes.Name)]
    return {node.name for node in (*tests, *names) if isinstance(node, nodes.Name)}

  def pins_of_date(self) -> list[str]:
    """The arguments that stand in for the date where they are given, such as date_string."""
    return sorted({assign.target.name for assign in self._tree.find_all(nodes.Assign)
                   if isinstance(assign.target, nodes.Name)
                   and assign.target.name in self.arguments
                   and any(name.name == CLOCK for name in assign.node.find_all(nodes.Name))})


def is_of_template(error: Exception) -> bool:
  """Whether rendering a template raised the error: jinja2 itself, or a statement of the template.

  A statement may raise an error of any type, such as ZeroDivisionError.
  """
  # jinja2 gives the statements of a template this name in place of a file's.
  return isinstance(error, jinja2.TemplateError) or any(
      frame.f_code.co_filename == "<template>"
      for frame, _ in traceback.walk_tb(error.__traceback__))


def _is_random(node: nodes.Filter | nodes.Name) -> bool:
  """Whether a node is the filter that chooses at random, alone or mapped, or the random text."""
  if isinstance(node, nodes.Name):
    return node.name == "lipsum"
  mapped = node.name == "map" and any(
      isinstance(arg, nodes.Const) and arg.value == "random" for arg in node.args)
  return node.name == "random" or mapped
