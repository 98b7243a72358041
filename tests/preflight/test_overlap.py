"""Which messages have products beside them, of programs written by hand."""

import pytest

from s2d_jax.preflight import overlap

GROUPS = "replica_groups=[1,4]<=[4], dimensions={0}"
# Two gathers of 4 x 64 bytes a device: the first ends at once, the second after a product. Then a
# sum that has no start.
TEXT = f"""HloModule jit_f, is_scheduled=true

%body (p: (f32[4,4], f32[4,4])) -> (f32[4,4], f32[4,4]) {{
  %p = (f32[4,4], f32[4,4]) parameter(0)
  %x = f32[4,4] get-tuple-element(%p), index=0
  %w = f32[4,4] get-tuple-element(%p), index=1
  %first = ((f32[4,4]), f32[16,4]) all-gather-start(%w), {GROUPS}
  %copy.1 = f32[4,4] copy(%x)
  %first.done = f32[16,4] all-gather-done(%first)
  %second = ((f32[4,4]), f32[16,4]) all-gather-start(%x), {GROUPS}, metadata={{op_name="f/mlp"}}
  %y = f32[4,4] dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %second.done = f32[16,4] all-gather-done(%second)
  ROOT %t = (f32[4,4], f32[4,4]) tuple(%y, %w)
}}

%condition (c: (f32[4,4], f32[4,4])) -> pred[] {{
  %c = (f32[4,4], f32[4,4]) parameter(0)
  ROOT %more = pred[] custom-call(%c), custom_call_target="f"
}}

ENTRY %main (a: f32[4,4], b: f32[4,4]) -> f32[4,4] {{
  %a = f32[4,4] parameter(0)
  %b = f32[4,4] parameter(1)
  %t.1 = (f32[4,4], f32[4,4]) tuple(%a, %b)
  %loop = (f32[4,4], f32[4,4]) while(%t.1), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}}}}
  %r = f32[4,4] get-tuple-element(%loop), index=0
  ROOT %sum = f32[4,4] all-reduce(%r), replica_groups=[1,4]<=[4], to_apply=%add
}}
"""


def test_messages_and_products_that_run_meanwhile():
  first, second, total = overlap.messages(TEXT)
  # Each of four devices passes three parts of 64 bytes on, in each of five trips.
  assert (first.opcode, first.bytes, first.flops, first.looped) == ("all-gather", 960, 0, True)
  assert (second.bytes, second.flops, second.source) == (960, 2 * 4**3, "f/mlp")
  # A sum sends three of its four parts of 16 bytes, and each sum again.
  assert total == overlap.Message("all-reduce", "", 96, 0, False)


def test_the_share_of_bytes():
  found = overlap.messages(TEXT)
  assert overlap.share(found[:2]) == 0.5
  assert overlap.share(found) == pytest.approx(960 / 2016)
  assert overlap.share([]) == 1.0
