"""Ids of the world's tokenizer by hand, arguments of a template, and refusals in one sentence."""

import json
import os
import string
import time

import pytest

from s2d_jax import chat
from s2d_jax.assets import tokenizer
from s2d_jax.errors import InputError

USER = [{"role": "user", "content": "12+34"}]
THINKING = """\
{%- if enable_thinking is defined and enable_thinking is false %}{{ '#' }}{% endif -%}"""

# As published Llama 3.2 templates ask for the date, after "01" in place of words.
DATED = """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %m %Y") %}
    {%- else %}
        {%- set date_string = "26 07 2024" %}
    {%- endif %}
{%- endif %}
{{- '<|system|>01 ' + date_string }}"""

PLAIN = tokenizer._CHAT_TEMPLATE


def change(folder, name, **values):
  path = folder / name
  tree = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(tree | values))
  return folder


@pytest.fixture
def folder(tmp_path):
  return written(tmp_path / "student")


def written(folder):
  tokenizer.write(folder, max_length=64)
  return change(folder, "config.json", model_type="qwen3", vocab_size=24)


@pytest.fixture
def printable(tmp_path, monkeypatch):
  """A folder whose tokenizer has every printable ASCII character."""
  characters = tuple(string.printable[:95]) + ("\n", "\t")
  monkeypatch.setattr(tokenizer, "VOCABULARY", tokenizer.SPECIAL + characters)
  return written(tmp_path / "printable")


def opened(folder, before="", template=None, **arguments):
  """The Chat of a folder after its template was extended in front, or replaced."""
  path = folder / "chat_template.jinja"
  path.write_text(before + path.read_text() if template is None else template)
  return chat.Chat(folder, **arguments)


def refused(*args, **arguments):
  """The sentence with which `opened` refuses."""
  with pytest.raises(InputError) as error:
    opened(*args, **arguments)
  sentence = str(error.value)
  assert sentence.endswith(".") and "\n" not in sentence
  return sentence


def test_render_by_hand(folder):
  # <|user|> is 4, <|assistant|> 5, the digits 6..15, "+" 16 (tokenizer.VOCABULARY).
  loaded = chat.Chat(folder)
  assert loaded.render(USER) == [4, 7, 8, 16, 9, 10, 5]
  answer = {"role": "assistant", "content": "46"}
  messages = [{"role": "system", "content": "0"}, *USER, answer, *USER]
  assert loaded.render(messages) == [3, 6, 4, 7, 8, 16, 9, 10, 5, 10, 12, 1, 4, 7, 8, 16, 9, 10, 5]


def test_responses_round_trip(folder):
  loaded = chat.Chat(folder)
  assert loaded.encode_response("12=") == [7, 8, 19, 1]
  assert loaded.eos_ids == (1,)
  for text in ("", "12+34=46+57=03", " 1 +\n\n2;# -*  ", "".join(tokenizer.VOCABULARY[6:])):
    assert loaded.decode(loaded.encode_response(text)) == text
    assert loaded.decode(loaded.encode_response(text) + [0] * 3) == text


def test_every_id_has_a_token():
  assert len(tokenizer.VOCABULARY) == len(set(tokenizer.VOCABULARY)) == 24  # a multiple of 8


def test_template_arguments_reach_the_template(folder):
  with open(folder / "chat_template.jinja", "a") as template:
    template.write(THINKING)
  plain = [4, 7, 8, 16, 9, 10, 5]
  assert chat.Chat(folder).render(USER) == plain
  assert chat.Chat(folder, enable_thinking=True).render(USER) == plain
  assert chat.Chat(folder, enable_thinking=False).render(USER) == plain + [20 + 1]


def test_eos_ids_of_the_generation_config_count_too(folder):
  change(folder, "generation_config.json", eos_token_id=[23, 1])
  loaded = chat.Chat(folder)
  assert loaded.eos_ids == (1, 23) and loaded.encode_response("1") == [7, 1]


def test_same_tokenizer(folder, tmp_path):
  chat.same_tokenizer(chat.Chat(folder), chat.Chat(written(tmp_path / "teacher")))
  assert chat.Chat(folder).fingerprint() == chat.Chat(tmp_path / "teacher").fingerprint()


def difference(folder, other):
  with pytest.raises(ValueError) as error:
    chat.same_tokenizer(chat.Chat(other), chat.Chat(folder))
  assert chat.Chat(other).fingerprint() != chat.Chat(folder).fingerprint()
  return str(error.value)


def test_another_vocabulary_is_named(folder, tmp_path):
  other = written(tmp_path / "teacher")
  path = other / "tokenizer.json"
  path.write_text(path.read_text().replace('"#": 21', '"?": 21'))
  assert "(the token '#' is absent and 21)" in difference(folder, other)


def test_different_end_tokens_are_named(folder, tmp_path):
  other = change(written(tmp_path / "teacher"), "generation_config.json", eos_token_id=23)
  assert "end tokens" in difference(folder, other)


def test_another_template_is_named(folder, tmp_path):
  other = written(tmp_path / "teacher")
  with open(other / "chat_template.jinja", "a") as template:
    template.write(THINKING)
  assert "chat templates" in difference(folder, other)


def test_unusable_tokenizer_folders_are_refused(folder, tmp_path):
  with pytest.raises(ValueError, match="has no tokenizer_config.json"):
    chat.Chat(tmp_path)
  (folder / "chat_template.jinja").unlink()
  with pytest.raises(ValueError, match="has no chat template"):
    chat.Chat(folder)
  change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
  with pytest.raises(ValueError, match="auto_map"):
    chat.Chat(folder)


def test_a_tokenizer_without_an_end_is_refused(folder):
  path = folder / "tokenizer_config.json"
  tree = json.loads(path.read_text())
  del tree["eos_token"]
  path.write_text(json.dumps(tree))
  with pytest.raises(ValueError, match="names no end token"):
    chat.Chat(folder)


def test_a_date_that_an_argument_pins_is_the_date_in_every_zone(folder):
  # <|system|> is 3, a digit d 6 + d, the space 22.
  expected = [3, 6, 7, 22, 8, 12, 22, 6, 13, 22, 8, 6, 8, 10, 4, 7, 8, 16, 9, 10, 5]
  found = []
  before = os.environ.get("TZ")
  try:
    for zone in ("Etc/GMT+12", "Etc/GMT-14", "Asia/Kathmandu"):
      os.environ["TZ"] = zone
      time.tzset()
      loaded = opened(folder, template=DATED + PLAIN, date_string="26 07 2024")
      found.append((loaded.render(USER), loaded.fingerprint()))
  finally:
    os.environ.pop("TZ") if before is None else os.environ.update(TZ=before)
    time.tzset()
  assert [ids for ids, _ in found] == [expected] * 3 and len(set(found[0][1:])) == 1
  assert {name for _, name in found} == {loaded.fingerprint()}


def test_a_pinned_date_is_part_of_the_fingerprint(folder):
  names = {opened(folder, template=DATED + PLAIN, date_string=date).fingerprint()
           for date in ("26 07 2024", "27 07 2024", "26 07 2024")}
  assert len(names) == 2


@pytest.mark.parametrize("before, remedy", [
    (DATED, "give the argument date_string of the template"),
    ("{{ strftime_now('%d') }}", "write a date into it in place of strftime_now"),
    ("{% set date_string = strftime_now('%d') %}{{ date_string }}", "write a date into it"),
    ("{% set f = strftime_now %}{{ f('%H') }}", "write a date into it"),
    ("{% macro m() %}{{ strftime_now('%Y') }}{% endmacro %}{{ m() }}", "write a date into it"),
    ("{% for m in messages %}{{ strftime_now('%j') }}{% endfor %}", "write a date into it"),
    ("{{ '1' if strftime_now('%H')|int > 12 else '2' }}", "write a date into it"),
    ("{{ strftime_now(format='%Z') }}", "write a date into it"),
    ("{% if today is not defined %}{% set today = strftime_now('%x') %}{% endif %}{{ today }}",
     "give the argument today of the template"),
    ("{% set ns = namespace(day=strftime_now('%A')) %}{{ ns.day }}", "write a date into it"),
    ("{% if not messages[1] %}{{ strftime_now('%s') }}{% endif %}", "write a date into it"),
])
def test_a_template_that_asks_for_the_date_is_refused(folder, before, remedy):
  sentence = refused(folder, before)
  assert f"the chat template in {folder}/chat_template.jinja asks for the date" in sentence
  assert remedy in sentence


@pytest.mark.parametrize("before", [
    "{{ lipsum(1) }}", "{{ ['1', '2']|random }}", "{{ [['1', '2']]|map('random')|first }}",
    "{% set l = lipsum %}{{ l() }}",
])
def test_a_template_that_draws_at_random_is_refused(folder, before):
  assert "draws at random" in refused(folder, before)


@pytest.mark.parametrize("before", [
    "{{ raise_exception }}", "{{ range }}{{ strftime_now }}{{ raise_exception }}",
    "{{ [raise_exception] }}", "{{ messages[0].items }}", "{{ cycler(1) }}",
])
def test_a_template_that_prints_an_address_is_refused(folder, before):
  assert "whose address differs from run to run" in refused(folder, before)


def test_a_date_that_only_some_messages_ask_for_is_refused_with_them(folder):
  loaded = opened(folder, "{% if messages[1] %}{{ strftime_now('%d') }}{% endif %}")
  assert loaded.render(USER) == [4, 7, 8, 16, 9, 10, 5]
  with pytest.raises(InputError, match="asks for the date"):
    loaded.render([*USER, {"role": "assistant", "content": "46"}, *USER])


def test_a_template_may_have_the_clock_and_not_ask_it(folder):
  loaded = opened(folder, "{% if strftime_now is defined and messages|length > 9 %}"
                          "{{ strftime_now('%d') }}{% endif %}")
  assert loaded.render(USER) == [4, 7, 8, 16, 9, 10, 5]


@pytest.mark.parametrize("arguments, reason", [
    ({"enable_thinkng": False}, "choose from effort, enable_thinking, show)"),
    ({"Enable_thinking": False}, "does not read the argument 'Enable_thinking'"),
    ({"thinking": True}, "does not read the argument 'thinking'"),
    ({"date_string": "1"}, "does not read the argument 'date_string'"),
    ({"messages": []}, "does not read the argument 'messages'"),
    ({"tools": []}, "does not read the argument 'tools'"),
    ({"strftime_now": "1"}, "does not read the argument 'strftime_now'"),
    ({"namespace": "1"}, "does not read the argument 'namespace'"),
    *(({name: value}, f"'{name}' is not an argument of a chat template") for name, value in (
        ("tokenize", False), ("truncation", True), ("max_length", 3), ("padding", True),
        ("return_tensors", "np"), ("return_dict", False), ("chat_template", "1"),
        ("add_generation_prompt", False), ("continue_final_message", True), ("conversation", []),
        ("tokenizer_kwargs", {"max_length": 3}))),
    ({"enable_thinking": "false"}, "'false' and is tested as a boolean: write true or false"),
    ({"enable_thinking": "no"}, "'no' and is tested as a boolean"),
    ({"enable_thinking": 0}, "0 and is tested as a boolean"),
    ({"enable_thinking": None}, "None and is tested as a boolean"),
    ({"show": "False"}, "'False' and is tested as a boolean"),
    ({"show": " null "}, "' null ' and is tested as a boolean"),
    ({"effort": "None"}, "'None' and is tested as a boolean"),
    ({"effort": float}, "are not JSON"),
    ({"effort": "<|end|>"}, "an argument of the chat template holds '<|end|>'"),
])
def test_an_argument_that_a_template_does_not_read_is_refused(folder, arguments, reason):
  assert reason in refused(folder, SWITCHED, **arguments)


SWITCHED = THINKING + """\
{%- if show %}{{ '1' }}{% endif -%}{%- if effort == 'none' %}{{ '2' }}{% endif -%}
{%- set local = 1 -%}"""


def test_arguments_that_a_template_reads(folder):
  plain = [4, 7, 8, 16, 9, 10, 5]
  loaded = opened(folder, SWITCHED)
  assert loaded.render(USER) == plain
  for arguments, ids in (({"enable_thinking": False}, [21]), ({"enable_thinking": True}, []),
                         ({"show": True}, [7]), ({"show": False}, []), ({"show": 0}, []),
                         ({"show": "1"}, [7]), ({"effort": "none"}, [8]), ({"effort": "low"}, [])):
    assert chat.Chat(folder, **arguments).render(USER) == ids + plain
  # The values are part of the fingerprint, and the order of writing is not.
  one = chat.Chat(folder, show=True, effort="low").fingerprint()
  assert chat.Chat(folder, effort="low", show=True).fingerprint() == one
  assert chat.Chat(folder, effort="low", show=False).fingerprint() != one


@pytest.mark.parametrize("template", [
    "{{ '1+2' }}",
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% endfor %}",
    "{% for m in messages %}{{ m.text }}{% endfor %}",
    "{% for m in messages %}{{ m['contents'] }}{% endfor %}",
    "{% for m in message %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m.content|length }}{% endfor %}",
    "{% for m in messages %}{{ m.content|upper }}{% endfor %}",
    "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    "{% set x = messages %}",
])
def test_a_template_that_leaves_the_question_out_is_refused(folder, template):
  assert "leaves the user's message out" in refused(folder, template=template)


def test_a_message_that_the_template_leaves_out_or_changes_is_named(folder):
  loaded = opened(folder, template="{% for m in messages if m.role == 'user' %}"
                                   "{{ m.content|e }}{% endfor %}")
  assert loaded.render(USER) == [7, 8, 16, 9, 10]
  with pytest.raises(InputError, match="changes the message of role 'system' in problem 3"):
    loaded.render([{"role": "system", "content": "56"}, *USER], "problem 3")
  with pytest.raises(InputError, match="changes the message of role 'user' in the convers"):
    loaded.render([{"role": "user", "content": "1<2"}])


@pytest.mark.parametrize("role", ["question", "human", "tool", "User", " user", "developer", ""])
def test_a_message_of_a_role_that_the_template_drops_is_refused(role, folder):
  template = ("{% for m in messages if m.role in ['system', 'user'] %}{{ m.content + ';' }}"
              "{% endfor %}")
  loaded = opened(folder, template=template)
  message = {"role": role, "content": "12"}
  # The words of a dropped message may stand in another one, or in none.
  for others in ([], USER, [{"role": "system", "content": "12"}]):
    with pytest.raises(InputError) as error:
      loaded.render([*others, message], "problem 3")
    assert str(error.value) == (
        f"the chat template in {folder}/chat_template.jinja leaves out or changes the message of "
        f"role {role!r} in problem 3: choose a role from system, user, assistant.")
  taken = loaded.render([*USER, {"role": "user", "content": "12"}])
  assert taken == [7, 8, 16, 9, 10, 20, 7, 8, 20]


def test_an_assistants_thoughts_may_be_left_out_and_no_other_words(printable):
  messages = [*USER, {"role": "assistant", "content": "<think>\n40 + 6</think>\n\n46 "}, *USER]
  thoughtless = "{% for m in messages %}{{ m.content.split('</think>')|last|trim }};{% endfor %}"
  loaded = opened(printable, template=thoughtless)
  assert loaded.decode(loaded.render(messages)) == "12+34;46;12+34;"
  silent = "{% for m in messages if m.role != 'assistant' %}{{ m.content }};{% endfor %}"
  with pytest.raises(InputError, match="leaves out or changes the message of role 'assistant'"):
    opened(printable, template=silent).render(messages)


def test_a_template_may_insist_on_a_system_message(folder):
  loaded = opened(folder, "{% if messages[0].role != 'system' %}"
                          "{{ raise_exception('system first') }}{% endif %}")
  assert loaded.render([{"role": "system", "content": "0"}, *USER]) == [3, 6, 4, 7, 8, 16, 9, 10, 5]
  with pytest.raises(InputError, match="the conversation is not a chat that .* takes .system firs"):
    loaded.render(USER)


def spoiled(folder, **parts):
  path = folder / "tokenizer.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | parts))
  return folder


def replace(pattern, content):
  return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


@pytest.mark.parametrize("parts, read", [
    # As transformers 5.3.0 reads a byte-level tokenizer whose config says LlamaTokenizerFast.
    ({"normalizer": replace(" ", "")}, "'Letx=3andy=12,345.'"),
    ({"normalizer": {"type": "Lowercase"}}, "'let x = 3"),
    ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, "\"two  spaces"),
    ({"normalizer": replace(" +", " ")}, "\" two spaces"),
    ({"normalizer": replace("[0-9]", "")}, "'Let x ="),
    ({"normalizer": replace(r"\\", "")}, "'frac{1}"),
    ({"normalizer": replace("\n", " ")}, "{-0.5}  $$"),
    ({"normalizer": replace("\n+", "\n")}, r"{-0.5}\n$$"),
    ({"normalizer": replace("\t", " ")}, r"46\n\n 7"),
    ({"normalizer": {"type": "Prepend", "prepend": " "}}, "' Let x"),
    ({"normalizer": replace(" ([,.;])", "$1")}, "spaces"),
    ({"decoder": None}, "'L e t   x"),
])
def test_a_tokenizer_that_changes_text_is_refused(printable, parts, read):
  sentence = refused(spoiled(printable, **parts))
  assert "back as" in sentence and "upgrade transformers" in sentence
  assert read in sentence.partition("back as")[2]


def test_a_tokenizer_of_every_character_is_taken(printable):
  loaded = chat.Chat(printable)
  for text in chat.PROBES:
    assert loaded.decode(loaded.encode_response(text)) == text


@pytest.mark.parametrize("text, token", [
    ("1+2<|end|>", "<|end|>"), ("<|end|>", "<|end|>"), ("1<|end|>\n2", "<|end|>"),
    ("<|end|><|end|>", "<|end|>"), ("1<|pad|>2", "<|pad|>"), ("<|user|>1", "<|user|>"),
    ("1<|assistant|>46", "<|assistant|>"), ("<|system|>0", "<|system|>"),
    ("<|unknown|>", "<|unknown|>"), ("1 <|end|> 2 <|pad|>", "<|end|>"), ("<<|end|>>", "<|end|>"),
])
def test_a_special_token_in_data_is_refused(folder, text, token):
  loaded = chat.Chat(folder)
  remedy = f"holds '{token}', a special token of {folder}"
  for role in ("user", "system", "assistant"):
    with pytest.raises(InputError) as error:
      loaded.render([{"role": role, "content": text}, *USER], "problem 7 of labelled")
    assert str(error.value).startswith(f"problem 7 of labelled {remedy}")
  with pytest.raises(InputError) as error:
    loaded.encode_response(text, "the solution of problem 7")
  assert str(error.value).startswith(f"the solution of problem 7 {remedy}")
  with pytest.raises(InputError, match="holds '<|end|>'"):
    loaded.render([{**USER[0], "name": "<|end|>"}])


def test_a_part_of_a_special_token_is_text(printable):
  loaded = chat.Chat(printable)
  for text in ("<|", "<|end|", "|end|>", "<| end |>", "<|END|>", "<|end| >", "end"):
    ids = loaded.encode_response(text)
    assert len(ids) == len(text) + 1 and ids.count(1) == 1
    loaded.render([{"role": "user", "content": text}])


@pytest.mark.parametrize("messages", [
    [], [{"role": "user"}], [{"content": "1"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": 12}], [{"role": None, "content": "1"}], ["12"], [None],
    [{"role": "user", "content": ["1"]}], [[{"role": "user", "content": "1"}]],
    [{"role": "user", "content": b"1"}],
])
def test_messages_that_are_none_are_refused(folder, messages):
  with pytest.raises(InputError, match="problem 1 is not a list of messages"):
    chat.Chat(folder).render(messages, "problem 1")


@pytest.mark.parametrize("text", ["\ud800", "1\udfff", "\udc80 2", "\ud83d1\ude00"])
def test_half_a_surrogate_pair_is_refused(folder, text):
  loaded = chat.Chat(folder)
  with pytest.raises(InputError, match="problem 2 holds half of a surrogate pair"):
    loaded.render([{"role": "user", "content": text}], "problem 2")
  with pytest.raises(InputError, match="the response holds half of a surrogate pair"):
    loaded.encode_response(text)


@pytest.mark.parametrize("template, reason", [
    ("", "is empty"), (" \n", "is empty"),
    ("{% for m in messages %}{{ m.content }}", "is not a template (line 1"),
    ("{{ messages[0].content }", "is not a template (line 1"),
    ("1\n{% if %}", "is not a template (line 2"), ("{% endif %}", "is not a template"),
    ("{{ messages|nofilter }}", "No filter named 'nofilter'"),
    ("{% unknown_tag %}", "is not a template"), ("{{ 1 +* 2 }}", "is not a template"),
    ("{{ '" , "is not a template"), ("{# ", "is not a template"),
    ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "is nested too deeply"),
    ("{{ messages[0].content }}{{ 1 / 0 }}", "(division by zero)"),
    ("{{ messages[0].content }}{{ messages[0].content + 1 }}", "is not a chat that"),
    ("{{ messages[0].content }}{{ undefined_name.field }}", "is not a chat that"),
    ("{{ messages[0].content.__class__.mro() }}", "is not a chat that"),
    ("{% for i in range(10**9) %}{% endfor %}{{ messages[0].content }}", "is not a chat that"),
    ("{% include 'other' %}{{ messages[0].content }}", "is not a chat that"),
    # Python's own limits: twenty blocks in each other, and the depth of calls.
    ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25 + "{{ messages[0].content }}", "nested too"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "is not a chat that"),
    ("{{ {}['a']['b'] }}", "is not a chat that"), ("{{ '%d' % 'a' }}", "is not a chat that"),
])
def test_a_template_that_is_none_is_refused(folder, template, reason):
  sentence = refused(folder, template=template)
  assert reason in sentence and str(folder) in sentence


@pytest.mark.parametrize("name, text, reason", [
    ("tokenizer.json", "{}", "is not a tokenizer that transformers"),
    ("tokenizer.json", '{"model": null}', "is not a tokenizer that transformers"),
    ("tokenizer.json", '{"version": "1.0", "model": {}}', "is not a tokenizer that transformers"),
    ("tokenizer.json", "[]", "is not a JSON object"),
    ("tokenizer.json", "", "is empty"), ("tokenizer.json", "{", "is not JSON"),
    ("tokenizer.json", None, "has no tokenizer.json: download it"),
    ("tokenizer_config.json", "null", "is not a JSON object"),
    ("tokenizer_config.json", "[" * 999 + "]" * 999, "is nested too deeply"),
    ("tokenizer_config.json", '{"eos_token": 3}', "_config.json has 3 under 'eos_token'"),
    ("tokenizer_config.json", '{"pad_token": {"text": "1"}}', "under 'pad_token', which is not a"),
    ("tokenizer_config.json", '{"extra_special_tokens": 3}', "has 3 under 'extra_special_tokens'"),
    ("tokenizer_config.json", '{"additional_special_tokens": [3]}', "_config.json has 3 under 'ad"),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "under 'added_tokens_decoder'"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "under 'added_tokens_dec"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "a"}}', "under 'added_tokens_deco"),
    ("tokenizer_config.json", '{"tokenizer_class": 3}', "under 'tokenizer_class': make it a text"),
    ("tokenizer_config.json", '{"pad_token": {"content": "<|pad|>"}}', "under 'pad_token', which"),
    ("tokenizer_config.json", '{"auto_map": {}}', "tokenizer_config.json asks for code of its own"),
    ("tokenizer.json", '{"added_tokens": 3}', "tokenizer.json has 3 under 'added_tokens'"),
    ("special_tokens_map.json", "[]", "special_tokens_map.json is not a JSON object"),
    ("special_tokens_map.json", '{"pad_token": 3}', "map.json has 3 under 'pad_token'"),
    ("added_tokens.json", "[]", "added_tokens.json is not a JSON object"),
    ("added_tokens.json", '{"<x>": "24"}', "added_tokens.json has '24' under '<x>': make it an"),
    ("added_tokens.json", '{"<x>": -1}', "added_tokens.json has -1 under '<x>'"),
    ("tokenizer_config.json", '{"model_max_length": "x"}', "has 'x' under 'model_max_length'"),
    ("tokenizer_config.json", '{"model_input_names": 3}', "has 3 under 'model_input_names'"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "under 'chat_template'"),
    ("tokenizer_config.json", '{"chat_template": ["x"]}', "has 'x' under 'chat_template', which"),
    ("generation_config.json", "null", "is not a JSON object"),
    ("generation_config.json", "7", "is not a JSON object"),
    ("generation_config.json", '"text"', "is not a JSON object"),
])
def test_a_spoiled_file_of_a_tokenizer_is_named(folder, name, text, reason):
  path = folder / name
  path.unlink(missing_ok=True) if text is None else path.write_text(text)
  sentence = refused(folder)
  assert reason in sentence and str(folder) in sentence


def test_of_several_templates_the_default_is_taken(folder):
  (folder / "chat_template.jinja").unlink()
  templates = [{"name": "default", "template": PLAIN}, {"name": "rag", "template": "1"}]
  change(folder, "tokenizer_config.json", chat_template=templates)
  assert chat.Chat(folder).render(USER) == [4, 7, 8, 16, 9, 10, 5]
  change(folder, "tokenizer_config.json", chat_template=templates[1:])
  with pytest.raises(InputError, match="several chat templates and none is the default"):
    chat.Chat(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("values, key, token", [
    ({"pad_token": "[PAD]"}, "pad_token", "[PAD]"), ({"bos_token": "<s>"}, "bos_token", "<s>"),
    ({"unk_token": "<unk>"}, "unk_token", "<unk>"), ({"sep_token": "[SEP]"}, "sep_token", "[SEP]"),
    ({"cls_token": ""}, "cls_token", ""), ({"mask_token": "<|END|>"}, "mask_token", "<|END|>"),
    ({"image_token": "<image>"}, "image_token", "<image>"),
    ({"pad_token": {"__type": "AddedToken", "content": "[PAD]"}}, "pad_token", "[PAD]"),
    ({"additional_special_tokens": ["<|end|>", "<x>"]}, "additional_special_tokens", "<x>"),
    ({"additional_special_tokens": [{"__type": "AddedToken", "content": "<x>"}]},
     "additional_special_tokens", "<x>"),
    ({"extra_special_tokens": ["<x>"]}, "extra_special_tokens", "<x>"),
    ({"extra_special_tokens": {"x_token": "<x>"}}, "extra_special_tokens", "<x>"),
])
def test_a_special_token_that_the_tokenizer_lacks_is_refused(folder, name, values, key, token):
  change(folder, name, **values)
  with pytest.raises(InputError) as error:
    chat.Chat(folder)
  assert str(error.value) == (f"{folder}/{name} has {token!r} under {key!r}, which is not a token "
                              "of its tokenizer.json: correct it, or remove it.")


def test_special_tokens_that_have_ids_are_taken(folder):
  before = chat.Chat(folder)
  change(folder, "tokenizer_config.json", pad_token="<|pad|>", bos_token=None, add_bos_token=False,
         additional_special_tokens=["<|user|>"])
  change(folder, "special_tokens_map.json", unk_token={"content": "<|unknown|>"})
  assert chat.Chat(folder).vocabulary == before.vocabulary
  # transformers passes this file over where the configuration lists the added tokens itself.
  change(folder, "tokenizer_config.json", added_tokens_decoder={})
  change(folder, "special_tokens_map.json", pad_token="[PAD]")
  assert chat.Chat(folder).vocabulary == before.vocabulary


@pytest.mark.parametrize("kind, token", [
    ("LlamaTokenizerFast", "<s>"), ("GPT2Tokenizer", "<|endoftext|>"), ("GemmaTokenizer", "<bos>")])
def test_a_class_that_adds_tokens_is_refused(folder, kind, token):
  change(folder, "tokenizer_config.json", tokenizer_class=kind)
  sentence = refused(folder)
  assert sentence.startswith(f"the tokenizer_class of {folder}/tokenizer_config.json adds the "
                             f"token {token!r}")


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_template_that_is_no_utf8_is_named(folder, name):
  path = folder / name
  path.parent.mkdir(exist_ok=True)
  path.write_bytes("{{ 'ü' }}".encode("latin-1"))
  with pytest.raises(InputError, match=f"{name} cannot be read as UTF-8"):
    chat.Chat(folder)


@pytest.mark.parametrize("written, source", [
    ("chat_template.jinja", "chat_template.jinja"), ("config", "tokenizer_config.json"),
    ("named", "tokenizer_config.json"), ("additional", "additional_chat_templates/tool_use.jinja"),
])
def test_the_file_of_a_wrong_template_is_named(folder, written, source):
  wrong = "{{ 1"
  arguments = {}
  if written == "chat_template.jinja":
    (folder / written).write_text(wrong)
  elif written == "additional":
    (folder / "additional_chat_templates").mkdir()
    (folder / source).write_text(wrong)
    arguments["tools"] = []
  else:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": wrong}, {"name": "rag", "template": PLAIN}]
    change(folder, source, chat_template=wrong if written == "config" else named)
  with pytest.raises(InputError) as error:
    chat.Chat(folder, **arguments)
  assert str(error.value).startswith(f"the chat template in {folder}/{source} is not a template")


@pytest.mark.parametrize("value", [3, {"default": 3}, True])
def test_a_template_that_is_no_text_is_refused(folder, value):
  (folder / "chat_template.jinja").unlink()
  change(folder, "tokenizer_config.json", chat_template=value)
  with pytest.raises(InputError, match="tokenizer_config.json has .* as a chat template: make it"):
    chat.Chat(folder)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, KeyError, OSError])
def test_an_error_of_the_library_keeps_its_traceback(folder, monkeypatch, error):
  loaded = chat.Chat(folder)
  def broken(*args, **kwargs):
    raise error("broken")
  with monkeypatch.context() as patch:
    patch.setattr(type(loaded._tokenizer), "apply_chat_template", broken)
    with pytest.raises(error, match="broken") as found:
      loaded.render(USER)
    assert not isinstance(found.value, InputError)
  if error in (RuntimeError, TypeError, KeyError):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", broken)
    with pytest.raises(error, match="broken"):
      chat.Chat(folder)
