"""Bytes that operations move, counted by hand."""

import pytest

from s2d_jax.preflight import hlo


def moved(*lines, computations=""):
  """Bytes of a program's only kernel, the last line."""
  text = "\n".join((computations, "ENTRY %main (a: s32[]) -> s32[] {",
                    *(f"  {line}" for line in lines), "}"))
  (kernel,) = hlo.kernels(text)
  return kernel.bytes


def fused(*lines):
  """Bytes of a fusion of these lines, whose parameters have the fusion's operands."""
  parameters = [line for line in lines if "parameter(" in line]
  names = [f"%operand.{i}" for i in range(len(parameters))]
  operands = [f"{name} = {line.partition(' = ')[2]}"
           for name, line in zip(names, parameters, strict=True)]
  result = next(line.partition(" = ")[2] for line in lines if line.startswith("ROOT"))
  # A tuple's type holds blanks.
  type_ = result[:result.index(")") + 1] if result.startswith("(") else result.partition(" ")[0]
  computation = "\n".join(("%fused (p: s32[]) -> s32[] {", *(f"  {x}" for x in lines), "}", ""))
  return moved(*operands, f"ROOT %f = {type_} fusion({', '.join(names)}), kind=kLoop, calls=%fused",
               computations=INNER + computation)


# A fusion inside of the fusions below.
INNER = """
%inner (i.0: bf16[64,128], i.1: s32[]) -> bf16[1,128] {
  %i.0 = bf16[64,128]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %i.2 = bf16[1,128]{1,0} dynamic-slice(%i.0, %i.1, %i.1), dynamic_slice_sizes={1,128}
}

"""
TABLE = "%p.0 = bf16[64,128]{1,0} parameter(0)"  # 16,384 bytes
INDEX = "%p.1 = s32[] parameter(1)"              # 4 bytes
ROW = "%p.2 = bf16[1,128]{1,0} parameter(2)"     # 256 bytes


@pytest.mark.parametrize("lines, expected", [
  # A row of a table of embeddings, cast before it is taken: 256 bytes read, 512 written.
  ([TABLE, INDEX, "%c = f32[64,128]{1,0} convert(%p.0)",
    "ROOT %r = f32[1,128]{1,0} dynamic-slice(%c, %p.1, %p.1), dynamic_slice_sizes={1,128}"],
   256 + 4 + 512),
  # That row in a fusion inside.
  ([TABLE, INDEX, "ROOT %r = bf16[1,128]{1,0} fusion(%p.0, %p.1), kind=kLoop, calls=%inner"],
   256 + 4 + 256),
  # Many rows with repetition: the table is read once at most.
  ([TABLE, "%p.1 = s32[512,1]{1,0} parameter(1)",
    "ROOT %r = bf16[512,128]{1,0} gather(%p.0, %p.1), slice_sizes={1,128}"],
   16_384 + 4 * 512 + 2 * 512 * 128),
  # A third of the columns of a sum of four parts: queries out of queries, keys and values.
  (["%p.0 = f32[4,64,96]{2,1,0} parameter(0)", "%z = f32[] constant(0)",
    "%s = f32[64,96]{1,0} reduce(%p.0, %z), dimensions={0}, to_apply=%add",
    "%e = f32[64,96]{1,0} multiply(%s, %s)",
    "ROOT %r = f32[64,32]{1,0} slice(%e), slice={[0:64], [0:32]}"],
   4 * 4 * 64 * 96 // 3 + 4 * 64 * 32),
  # Two readers of overlapping parts, and the whole beside a part.
  (["%p.0 = f32[64,96]{1,0} parameter(0)", "%e = f32[64,96]{1,0} exponential(%p.0)",
    "%s = f32[64,48]{1,0} slice(%e), slice={[0:64], [0:48]}",
    "ROOT %r = (f32[64,96]{1,0}, f32[64,48]{1,0}) tuple(%e, %s)"], 4 * 64 * (96 + 96 + 48)),
  # A row is written into a cache in place: the row alone is read and written.
  ([TABLE, INDEX, ROW,
    "ROOT %r = bf16[64,128]{1,0} dynamic-update-slice(%p.0, %p.2, %p.1, %p.1)"],
   4 + 256 + 256),
  # Another row of the cache is the one that is written.
  ([TABLE, INDEX, "%s = bf16[1,128]{1,0} dynamic-slice(%p.0, %p.1, %p.1)",
    "ROOT %r = bf16[64,128]{1,0} dynamic-update-slice(%p.0, %s, %p.1, %p.1)"], 256 + 4 + 256),
  # An update of zeros is not in place: all of the result is written.
  (["%p.0 = s32[] parameter(0)", "%p.1 = bf16[1,128]{1,0} parameter(1)",
    "%z = bf16[] constant(0)", "%b = bf16[64,128]{1,0} broadcast(%z), dimensions={}",
    "ROOT %r = bf16[64,128]{1,0} dynamic-update-slice(%b, %p.1, %p.0, %p.0)"],
   4 + 256 + 16_384),
  # Where the result is only summed, the cache is read.
  ([TABLE, INDEX, ROW, "%u = bf16[64,128]{1,0} dynamic-update-slice(%p.0, %p.2, %p.1, %p.1)",
    "%z = bf16[] constant(0)",
    "ROOT %r = bf16[64]{0} reduce(%u, %z), dimensions={1}, to_apply=%add"],
   16_384 + 4 + 256 + 128),
  # An array that passes through is neither read nor written.
  ([TABLE, "%p.1 = f32[8]{0} parameter(1)", "%e = f32[8]{0} exponential(%p.1)",
    "ROOT %r = (f32[8]{0}, bf16[64,128]{1,0}) tuple(%e, %p.0)"], 64),
  # A parameter without use.
  ([TABLE, "%p.1 = f32[8]{0} parameter(1)", "ROOT %r = f32[8]{0} exponential(%p.1)"], 64),
  # A library's product of one layer's slice: its scratch memory is not counted.
  (["%p.0 = bf16[4,64,128]{2,1,0} parameter(0)", INDEX,
    "%s = bf16[1,64,128]{2,1,0} dynamic-slice(%p.0, %p.1, %p.1, %p.1)",
    "ROOT %r = (bf16[64,64]{1,0}, s8[33554432]{0}) custom-call(%s, %s), "
    'custom_call_target="__cublas$gemm"'], 16_384 + 4 + 2 * 64 * 64),
  # A TPU's arrays beside its memory.
  (["%p.0 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)",
    "ROOT %r = f32[64,128]{1,0:T(8,128)} convert(%p.0)"], 4 * 64 * 128),
])
def test_the_bytes_of_a_fusion_by_hand(lines, expected):
  assert fused(*lines) == expected


A = "%a = bf16[64,128]{1,0} parameter(0)"
TILED = "{1,0:T(8,128)(2,1)}"
ON_CHIP = "{1,0:T(8,128)(2,1)S(1)}"


@pytest.mark.parametrize("lines, expected", [
  # A product's scratch memory is not counted.
  ([A, "%r = (bf16[64,64]{1,0}, s8[33554432]{0}) custom-call(%a, %b), "
       'custom_call_target="__cublas$gemm"'], 16_384 + 2 * 64 * 64),
  # Bytes that a kernel of our own returns are a result.
  ([A, "%r = (bf16[64,64]{1,0}, s8[64,128]{1,0}) custom-call(%a), "
       'custom_call_target="__gpu$xla.gpu.triton"'], 16_384 + 2 * 64 * 64 + 64 * 128),
  # A product reads the array that it adds to.
  ([A, "%c = bf16[64,64]{1,0} parameter(1)", "%r = (bf16[64,64]{1,0}, s8[4096]{0}) "
       'custom-call(%a, %a, %c), custom_call_target="__cublas$gemm", '
       "output_to_operand_aliasing={{0}: (2, {})}"], 16_384 + 2 * 2 * 64 * 64),
  # A kernel that writes into the cache need not touch it whole.
  ([A, "%q = bf16[1,128]{1,0} parameter(1)", "%r = bf16[64,128]{1,0} custom-call(%q, %a), "
       'custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (1, {})}'],
   256),
  ([A, '%r = bf16[64,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"'], 0),
  # An operand that is named twice is read once.
  ([A, "%r = bf16[64,128]{1,0} multiply(%a, %a)"], 2 * 16_384),
  ([A, "%r = bf16[64,128]{1,0} copy(%a)"], 2 * 16_384),
  # A TPU fetches a weight ahead of its use: it is read, and not written to the memory.
  ([f"%a = bf16[64,128]{TILED} parameter(0)", f"%r = (bf16[64,128]{ON_CHIP}, bf16[64,128]{TILED}, "
    "u32[]{:S(2)}) copy-start(%a)"], 16_384),
  ([f"%a = bf16[64,128]{TILED} parameter(0)", f"%r = ((bf16[64,128]{TILED}), bf16[8,128]{ON_CHIP}, "
    "s32[]{:T(128)S(2)}) slice-start(%a), slice={[0:8], [0:128]}"], 8 * 256),
  # A GPU's memory for messages is its memory.
  ([A, "%r = bf16[64,128]{1,0:S(1)} copy(%a)"], 2 * 16_384),
  # An array that is left with the host.
  ([A, "%r = bf16[64,128]{1,0:S(5)} copy(%a)"], 16_384),
])
def test_the_bytes_outside_of_fusions_by_hand(lines, expected):
  assert moved(*lines) == expected
