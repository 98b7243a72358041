"""Counts of compiled programs against products, bytes and trips counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from s2d_jax import sharding
from s2d_jax.preflight import costs, hlo, verdicts

# A loop of a TPU's program: its trips follow from the counter's start, step and limit.
LOOP = """HloModule jit_f

%body (p.1: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %step = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %step)
  %w = f32[16,16]{1,0} constant({...})
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %dot.1 = f32[8,16]{1,0:T(8,128)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%next, %dot.1)
}

%condition (p.2: (s32[], f32[8,16])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %constant.5 = s32[]{:T(128)} constant(5)
  ROOT %compare.1 = pred[]{:T(512)} compare(%i.2, %constant.5), direction=LT
}

ENTRY %main (a: f32[8,16]) -> (s32[], f32[8,16]) {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %t.2 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%zero, %a)
  ROOT %while.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%t.2), body=%body,\
    condition=%condition
}
"""


def counted(f, *shapes, trips=1):
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return hlo.total(hlo.kernels(jax.jit(f).lower(*arrays).compile().as_text(), trips))


def layers(weights_LDD, x_TD):
  return jax.lax.scan(lambda x, w: (x @ w, None), x_TD, weights_LDD)[0]


def test_a_product_is_two_operations_for_each_pair():
  found = counted(jnp.matmul, (64, 128), (128, 256))
  assert found.flops == 2 * 64 * 128 * 256
  assert found.bytes == 4 * (64 * 128 + 128 * 256 + 64 * 256)


def test_a_product_inside_a_scan_counts_its_trips():
  found = counted(layers, (28, 128, 128), (32, 128))
  assert found.flops == 28 * 2 * 32 * 128 * 128
  assert found.flops == 7 * counted(layers, (4, 128, 128), (32, 128)).flops


def test_each_trip_reads_its_own_layer():
  # A slice out of the stack is read, not the stack: 28 times the layer and the activations.
  found = counted(layers, (28, 128, 128), (32, 128))
  assert 28 * 4 * 128 * 128 <= found.bytes < 5 * 28 * 4 * (128 * 128 + 2 * 32 * 128)


def test_loops_in_loops_multiply():
  def twice(weights_LDD, x_TD):
    return jax.lax.scan(lambda x, _: (layers(weights_LDD, x), None), x_TD, None, length=3)[0]
  assert counted(twice, (5, 128, 128), (32, 128)).flops == 15 * 2 * 32 * 128 * 128


def test_a_loop_of_unknown_length_runs_as_often_as_the_caller_says():
  def some(x_TD, w_DD):
    return jax.lax.while_loop(lambda x: x[0, 0] < 9.0, lambda x: x @ w_DD, x_TD)
  product = 2 * 32 * 128 * 128
  assert counted(some, (32, 128), (128, 128)).flops == product
  assert counted(some, (32, 128), (128, 128), trips=11).flops == 11 * product


def test_an_unknown_loop_inside_an_unknown_loop_counts_once():
  def inner(x_TD, w_DD):
    return jax.lax.while_loop(lambda x: x[0, 1] < 9.0, lambda x: x @ w_DD, x_TD)
  def outer(x_TD, w_DD):
    return jax.lax.while_loop(lambda x: x[0, 0] < 9.0, lambda x: inner(x, w_DD), x_TD)
  assert counted(outer, (32, 128), (128, 128), trips=11).flops == 11 * 2 * 32 * 128 * 128


def looped(text, unknown_trips=1):
  """The product inside LOOP's loop."""
  (product,) = [x for x in hlo.kernels(text, unknown_trips) if x.opcode == "dot"]
  assert product.flops == product.count * 2 * 8 * 16 * 16
  return product


def test_the_trips_in_a_loops_condition_are_read():
  assert looped(LOOP).count == 5


@pytest.mark.parametrize("start, step, limit, direction, trips", [
    (0, 1, 5, "LT", 5), (1, 1, 5, "LT", 4), (0, 2, 8, "LT", 4), (1, 2, 8, "LT", 4),
    (0, 2, 5, "LT", 3), (0, 1, 5, "LE", 6), (1, 1, 5, "LE", 5), (0, 2, 8, "LE", 5),
    (1, 2, 8, "LE", 4), (5, -1, 0, "GT", 5), (5, -2, 0, "GE", 3), (0, 2, 8, "NE", 4),
    (9, 1, 5, "LT", 0)])
def test_trips_are_those_from_start_to_limit_by_step(start, step, limit, direction, trips):
  text = LOOP.replace("direction=LT", f"direction={direction}")
  for old, new in (("%zero = s32[]{:T(128)} constant(0)", start),
                   ("%step = s32[]{:T(128)} constant(1)", step),
                   ("%constant.5 = s32[]{:T(128)} constant(5)", limit)):
    text = text.replace(old, f"{old.partition(' ')[0]} = s32[] constant({new})")
  assert looped(text, unknown_trips=100).count == trips


def test_a_limit_that_is_compared_with_the_counter_is_the_same():
  text = LOOP.replace("compare(%i.2, %constant.5), direction=LT",
                      "compare(%constant.5, %i.2), direction=GT")
  assert looped(text).count == 5


def test_constants_are_read_through_tuples_copies_and_fusions():
  # The step is carried by the loop and added in a fusion; the start is a copy of a constant.
  text = LOOP.replace("(s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)})",
                      "(s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, s32[]{:T(128)})")
  text = text.replace("%step = s32[]{:T(128)} constant(1)",
                      "%step = s32[]{:T(128)} get-tuple-element(%p.1), index=2")
  text = text.replace("%next = s32[]{:T(128)} add(%i, %step)",
                      "%next = s32[]{:T(128)} fusion(%i, %step), kind=kLoop, calls=%add")
  text = text.replace("tuple(%next, %dot.1)", "tuple(%next, %dot.1, %step)")
  text = text.replace("tuple(%zero, %a)", "tuple(%zero.1, %a, %two)")
  text = text.replace("%zero = s32[]{:T(128)} constant(0)", "\n  ".join((
      "%two = s32[]{:T(128)} constant(2)", "%zero = s32[]{:T(128)} constant(0)",
      "%zero.1 = s32[]{:T(128)} copy(%zero)")))
  text = text.replace("%body (", "\n".join((
      "%add (q.1: s32[], q.2: s32[]) -> s32[] {", "  %q.1 = s32[] parameter(0)",
      "  %q.2 = s32[] parameter(1)", "  ROOT %sum = s32[] add(%q.1, %q.2)", "}", "", "%body (")))
  assert looped(text, unknown_trips=100).count == 3


@pytest.mark.parametrize("line, changed", [
    ("%next = s32[]{:T(128)} add(%i, %step)", "%next = s32[]{:T(128)} multiply(%i, %step)"),
    ("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} parameter(1)"),
    ("%constant.5 = s32[]{:T(128)} constant(5)",
     "%constant.5 = s32[]{:T(128)} get-tuple-element(%p.2), index=0"),
    # A body whose result is not formed by a tuple: its operands are not the carried values.
    ("tuple(%next, %dot.1)", 'custom-call(%next, %dot.1), custom_call_target="f"'),
    ("tuple(%next, %dot.1)", 'custom-call(), custom_call_target="f"')])
def test_an_unreadable_counter_gives_the_callers_trips(line, changed):
  assert line in LOOP
  assert looped(LOOP.replace(line, changed), unknown_trips=7).count == 7


def test_a_second_condition_makes_the_trips_unknown():
  text = LOOP.replace("ROOT %compare.1", "%compare.0").replace(
      "direction=LT\n}", "direction=LT\n  ROOT %and.1 = pred[] and(%compare.0, %flag)\n}")
  assert looped(text, 3).flops == 3 * 2 * 8 * 16 * 16


@pytest.mark.parametrize("line, flops", [
  # A plain product as a convolution: 8 rows, 16 in, 32 out.
  ("f32[8,32] convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
  # Four products of a batch: the window passes over it, and only one position of four is real.
  ("f32[4,8,32] convolution(%c, %d), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, "
   "dim_labels=0bf_0io->0bf", 2 * 4 * 8 * 16 * 32),
])
def test_a_tpus_product_is_a_convolution(line, flops):
  text = "\n".join((
      "ENTRY %main (a: f32[8,16]) -> f32[8,32] {", "  %a = f32[8,16] parameter(0)",
      "  %b = f32[16,32] parameter(1)", "  %c = f32[4,8,16] parameter(2)",
      "  %d = f32[4,16,32] parameter(3)", f"  ROOT %r = {line}", "}"))
  assert hlo.total(hlo.kernels(text)).flops == flops


@pytest.mark.parametrize("target, attributes, products", [
  ("__cudnn$fmhaSoftmax", '"mask_type":"NO_MASK"', 2.0),
  ("__cudnn$fmhaSoftmax", '"mask_type":"CAUSAL"', 1.0),
  ("__cudnn$fmhaSoftmaxBackward", '"mask_type":"PADDING_CAUSAL"', 2.5),
])
def test_attention_kernels_by_formula(target, attributes, products):
  # Queries [2, 512, 16, 64] read keys [2, 512, 8, 64]: 2·T·S·H for each product and head.
  text = "\n".join((
      "ENTRY %main (q: bf16[2]) -> bf16[2] {", "  %q = bf16[2,512,16,64]{3,2,1,0} parameter(0)",
      "  %k = bf16[2,512,8,64]{3,2,1,0} parameter(1)",
      "  ROOT %r = (bf16[2,512,16,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), "
      f'custom_call_target="{target}", backend_config={{{attributes}}}', "}"))
  assert hlo.total(hlo.kernels(text)).flops == products * 2 * 2 * 16 * 512 * 512 * 64


@pytest.mark.parametrize("target, unknown", [
  ("__gpu$xla.gpu.triton", True), ("tpu_custom_call", True), ("my_product", True),
  ("__cublas$gemm", False), ("TopK", False), ("__cub$DeviceRadixSort", False),
  ("AllocateBuffer", False)])
def test_custom_calls_without_a_formula_are_named(target, unknown):
  text = "\n".join((
      "ENTRY %main (a: f32[8,16]) -> f32[8,32] {", "  %a = f32[8,16] parameter(0)",
      "  %b = f32[16,32] parameter(1)", "  %d = f32[8,32] dot(%a, %b), lhs_contracting_dims={1}",
      f'  ROOT %r = f32[8,32] custom-call(%a, %b), custom_call_target="{target}"', "}"))
  found = hlo.total(hlo.kernels(text))
  assert found.unknown == ({target} if unknown else set())
  cost = costs.Cost("stage", "update", costs.Account(1, 0, 0, 0), 0, 1.0, found, None)
  assert (f"no formula has their products: {target}" in verdicts.summary([[cost]], 10)) == unknown


def test_a_pallas_kernel_has_its_name():
  text = "\n".join((
      "ENTRY %main (a: f32[8,16]) -> f32[8,16] {", "  %a = f32[8,16] parameter(0)",
      '  ROOT %r = f32[8,16] custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", '
      'backend_config={grid_x = 8 : i32, name = "decode_norm", num_stages = 3 : i32}', "}"))
  (found,) = hlo.kernels(text)
  assert found.opcode == "decode_norm" and not found.unknown


@pytest.mark.parametrize("count", [2, 4, 8])
def test_devices_share_products_and_add_up_in_messages(count):
  # Rows are split: each device multiplies its own, and the gradient [128, 256] is added up.
  mesh = sharding.make_mesh((count, 1, 1))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = sharding.replicated(mesh)
  arrays = [jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=rows),
            jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=rows)]
  compiled = jax.jit(lambda x, y: x.T @ y, out_shardings=whole).lower(*arrays).compile()
  found = hlo.total(hlo.kernels(compiled.as_text()))
  assert found.flops == 2 * 64 * 128 * 256 / count
  np.testing.assert_allclose(found.collective_bytes, 2 * 4 * 128 * 256 * (count - 1) / count)


REDUCE = """HloModule jit_f

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %reduce.1 = f32[8,16]{1,0} all-reduce(%a), channel_id=1, replica_groups=GROUPS, to_apply=%add
}
"""


@pytest.mark.parametrize("groups, count", [
    ("{{0,1,2,3},{4,5,6,7}}", 4), ("[2,4]<=[8]", 4), ("mesh['a'=2,'b'=4] {'b'}", 4),
    ("mesh['a'=2,'b'=4] {'a','b'}", 8), ("mesh['a'=2,'b'=4] {'b':(1)2}", 2),
    ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", 2)])
def test_every_spelling_of_a_collectives_devices_is_read(groups, count):
  # A ring of n devices sends each part of the 512 bytes twice past n - 1 of them.
  (kernel,) = hlo.kernels(REDUCE.replace("GROUPS", groups), 1)
  assert kernel.collective_bytes == 2 * 512 * (count - 1) / count


def test_a_kernel_with_line_breaks_is_read_to_its_end():
  # As a TPU's program has it: facts in lines of their own stand before the kernel's source.
  text = "\n".join((
      "ENTRY %main (q: bf16[2,256,128]) -> bf16[2,256,128] {",
      "  %q = bf16[2,256,128]{2,1,0} parameter(0)",
      "  ROOT %pallas.1 = bf16[2,256,128]{2,1,0} custom-call(%q, %q, %q), "
      'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={',
      '"xprof_metadata":"{\\"block_q\\": 128}"',
      '}}, metadata={op_name="jit(f)/splash_mha_fwd/pallas_call"}', "}"))
  (kernel,) = hlo.kernels(text)
  assert kernel.source == "jit(f)/splash_mha_fwd/pallas_call"
  # Two products of half of all pairs.
  assert kernel.flops == 2 * 2 * 2 * 256 * 256 / 2 * 128


# As a TPU runs a collective beside other kernels: it begins in one fusion, stands in a second that
# runs beside it, and ends in a third, on one channel.
ASYNC = """HloModule jit_f

%start (s.0: bf16[256,64]) -> (bf16[256,64], bf16[1024,64], u32[]) {
  %s.0 = bf16[256,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1024,64]{1,0:T(8,128)(2,1)} all-gather(%s.0), channel_id=7, GROUPS
  ROOT %begin = (bf16[256,64]{1,0:T(8,128)(2,1)}, bf16[1024,64]{1,0:T(8,128)(2,1)},\
    u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (b.0: bf16[256,64], b.1: bf16[1024,64], b.2: f32[8,16]) -> (f32[8,16], bf16[1024,64]) {
  %b.0 = bf16[256,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b.1 = bf16[1024,64]{1,0:T(8,128)(2,1)} parameter(1)
  %b.2 = f32[8,16]{1,0:T(8,128)} parameter(2)
  %all-gather.2 = bf16[1024,64]{1,0:T(8,128)(2,1)} all-gather(%b.0), channel_id=7, GROUPS
  %exp.1 = f32[8,16]{1,0:T(8,128)} exponential(%b.2)
  ROOT %t.1 = (f32[8,16]{1,0:T(8,128)}, bf16[1024,64]{1,0:T(8,128)(2,1)}) tuple(%exp.1, %b.1)
}

%done (d.0: bf16[256,64], d.1: bf16[1024,64]) -> bf16[1024,64] {
  %d.0 = bf16[256,64]{1,0:T(8,128)(2,1)} parameter(0)
  %d.1 = bf16[1024,64]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.3 = bf16[1024,64]{1,0:T(8,128)(2,1)} all-gather(%d.0), channel_id=7, GROUPS
  ROOT %end = bf16[1024,64]{1,0:T(8,128)(2,1)} custom-call(%d.0, %d.1, %all-gather.3),\
    custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[256,64], x: f32[8,16]) -> bf16[1024,64] {
  %a = bf16[256,64]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} parameter(1)
  %f.1 = (bf16[256,64]{1,0:T(8,128)(2,1)}, bf16[1024,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})\
    fusion(%a), kind=kCustom, calls=%start
  %g.1 = bf16[1024,64]{1,0:T(8,128)(2,1)} get-tuple-element(%f.1), index=1
  %f.2 = (f32[8,16]{1,0:T(8,128)}, bf16[1024,64]{1,0:T(8,128)(2,1)}) fusion(%a, %g.1, %x),\
    kind=kCustom, calls=%beside
  ROOT %f.3 = bf16[1024,64]{1,0:T(8,128)(2,1)} fusion(%a, %g.1), kind=kCustom, calls=%done
}
"""


def test_a_collective_inside_fusions_is_counted_once():
  text = ASYNC.replace("GROUPS", "replica_groups=[1,4]<=[4], dimensions={0}")
  start, middle, done = hlo.kernels(text)
  # A device passes 3 parts of four on; it reads its own part and writes them all.
  assert start.collective_bytes == 3 * 2 * 256 * 64
  assert start.bytes == 2 * (256 + 1024) * 64
  assert middle.collective_bytes == 0 and middle.bytes == 2 * 4 * 8 * 16
  assert done.collective_bytes == 0 and done.bytes == 0


# A TPU's reduce-scatter.
SCATTERED = """HloModule jit_f

%all-reduce-scatter (input: bf16[1024,64], i: s32[], j: s32[]) -> bf16[PART,64] {
  %input = bf16[1024,64]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  %j = s32[] parameter(2)
  %all-reduce.2 = bf16[1024,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=4,\
    replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice.3 = bf16[PART,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.2, %i, %j),\
    dynamic_slice_sizes={PART,64}
}

ENTRY %main (a: bf16[1024,64], i: s32[], j: s32[]) -> bf16[PART,64] {
  %a = bf16[1024,64]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  %j = s32[] parameter(2)
  ROOT %fusion = bf16[PART,64]{1,0:T(8,128)(2,1)} fusion(%a, %i, %j), kind=kCustom,\
    calls=%all-reduce-scatter
}
"""


@pytest.mark.parametrize("rows, gathered", [(128, 0), (256, 128), (512, 384), (1024, 896)])
def test_a_sum_of_which_a_device_keeps_a_slice_is_scattered(rows, gathered):
  # A ring of 8 devices passes 7 of 8 parts of 128 rows on once. Where a device keeps more than one
  # part, the parts that it lacks are sent besides.
  (kernel,) = hlo.kernels(SCATTERED.replace("PART", str(rows)))
  assert kernel.collective_bytes == 2 * 64 * (7 * 128 + gathered)


def test_a_sum_that_is_the_index_of_a_slice_is_sent_whole():
  text = SCATTERED.replace("PART", "128").replace(
      "(%all-reduce.2, %i, %j)", "(%input, %all-reduce.2, %j)").replace(
      "bf16[1024,64]{1,0:T(8,128)(2,1)} all-reduce(%input)", "s32[] all-reduce(%i)")
  (kernel,) = hlo.kernels(text)
  assert kernel.collective_bytes == 2 * 4 * 7 / 8


def test_a_collective_inside_a_fusion_counts_the_trips_of_its_loop():
  fused = """%gathered (g.0: f32[16,16]) -> f32[64,16] {
  %g.0 = f32[16,16]{1,0} parameter(0)
  ROOT %all-gather.9 = f32[64,16]{1,0} all-gather(%g.0), channel_id=1, replica_groups=[1,4]<=[4]
}

%body ("""
  text = LOOP.replace("%body (", fused).replace(
      "  %x =", "  %all = f32[64,16]{1,0} fusion(%w), kind=kCustom, calls=%gathered\n  %x =")
  assert hlo.total(hlo.kernels(text)).collective_bytes == 5 * 3 * 4 * 16 * 16


def test_an_asynchronous_fusion_counts_the_updated_part():
  # A GPU writes one layer's gradient into the stack of all: 4 * 16 * 8 bytes are read and written.
  stack = "f32[28,16,8]{2,1,0}"
  layer = "f32[1,16,8]{2,1,0}"
  text = "\n".join((
      f"%update (p.0: {stack}, p.1: {layer}, p.2: s32[]) -> {stack} {{",
      f"  %p.0 = {stack} parameter(0)", f"  %p.1 = {layer} parameter(1)",
      "  %p.2 = s32[] parameter(2)",
      f"  ROOT %u = {stack} dynamic-update-slice(%p.0, %p.1, %p.2, %p.2, %p.2)", "}", "",
      "ENTRY %main (a: s32[]) -> s32[] {",
      f"  %a = {stack} parameter(0)", f"  %b = {layer} parameter(1)", "  %c = s32[] parameter(2)",
      f"  %f = (({stack}, {layer}, s32[]), {stack}, u32[]) fusion-start(%a, %b, %c), kind=kLoop, "
      "calls=%update", f"  ROOT %d = {stack} fusion-done(%f)", "}"))
  (kernel,) = hlo.kernels(text)
  assert kernel.bytes == 2 * 4 * 16 * 8 + 4
