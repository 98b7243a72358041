"""The results as a table in Markdown, with a line for each part that has not finished."""

from collections.abc import Iterator

from benchmarks.accelerator.store import Json

HEADER = "| part | what | result | share | least |\n|---|---|---|---|---|"
FINISHED = "finished"
ASSUMED = "assumed rates"  # the result where this card's own are missing
LEFT_OUT = "left out"  # the result with the reason of each rival that is missing


def of(found: Json) -> str:
  """The table of a result file."""
  device = found.get("machine", {}).get("device", "unknown device")
  lines = [f"{device}, jax {found.get('machine', {}).get('jax', '?')}, "
           f"revision {found.get('revision', '?')}", "", HEADER]
  for name, part in found["parts"].items():
    revision = part.get("revision", found.get("revision"))
    if revision != found.get("revision"):  # of an earlier run
      name = f"{name} ({revision[:7]}, jax {part.get('jax', '?')})"
    lines += ["| " + " | ".join((name, *cells)) + " |" for cells in _part(name, part["results"])]
    if part.get("status") != FINISHED:
      lines.append(f"| {name} | **{part.get('status', 'not finished')}** | | | |")
  return "\n".join(lines)


def _part(name: str, results: Json) -> Iterator[tuple[str, str, str, str]]:
  """(label, result, share, least time) of a part's results."""
  for label, values in results.items():
    if label == "rates":
      yield ("bfloat16 product", f"{values['flops_per_second'] / 1e12:,.0f} TFLOP/s", "", "")
      yield ("reading", f"{values['bytes_per_second'] / 1e12:,.2f} TB/s", "", "")
    elif label == ASSUMED:
      yield ("**by an H200's rates**", f"{values['flops_per_second'] / 1e12:,.0f} TFLOP/s, "
             f"{values['bytes_per_second'] / 1e12:,.2f} TB/s, as this card's are missing", "", "")
    elif label == "trace":
      yield from _trace(values)
    elif label == "account":
      yield _account(values)
    elif label == "start":
      yield _start(values)
    elif label == LEFT_OUT:
      for side, reason in values.items():
        yield (side, f"**left out: {reason}**", "", "")
    elif label == "run":
      yield ("whole run", f"{values['seconds']:,.1f} s", "", "")
    elif "seconds_per_step" in values:
      rows = "1 row" if label == "1 rows" else label
      yield (rows, f"{values['tokens_per_second']:,.0f} tokens/s, "
             f"{values['seconds_per_step'] * 1e3:,.2f} ms a step",
             f"{values['share_of_bandwidth']:.0%} of bandwidth", _least(values))
    elif name.startswith("rival"):
      yield from _rivals(label, values)
    elif "seconds" in values:
      yield _timed(label, values)


def _timed(label: str, values: Json) -> tuple[str, str, str, str]:
  """A repeated program or step."""
  result = f"{values['seconds'] * 1e3:,.1f} ms"
  if "tokens_per_second" in values:
    result += f", {values['tokens_per_second']:,.0f} tokens/s"
  parts = [f"{part} {values[part]:,.2f} s" for part in ("draw", "reward", "update")
           if part in values]
  share = values.get("share_of_peak")
  return (label, ", ".join([result, *parts]), f"{share:.0%} of FLOP/s" if share else "",
          _least(values))


def _least(values: Json) -> str:
  """The least time of a program's own kernels."""
  if "least_seconds" not in values:
    return ""
  return f"{values['least_seconds'] * 1e3:,.2f} ms, {values['kernels']:,} kernels"


def _start(values: Json) -> tuple[str, str, str, str]:
  """Seconds until a process is ready, where they were measured, and of its first step."""
  parts = []
  if "seconds" in values:
    parts.append(f"{values['seconds']:,.1f} s")
  if "compile_seconds" in values:
    parts.append(f"{values['compile_seconds']:,.1f}{'' if parts else ' s'} of compilation")
  result = ", ".join(parts)
  if "first_step_seconds" in values:
    result += f"; first step {values['first_step_seconds']:,.1f} s"
  return ("start", result, "", "")


def _account(values: Json) -> tuple[str, str, str, str]:
  """The compiler's account beside the allocator's peak."""
  result = f"{values['account_bytes'] / 1e9:,.3f} GB by the compiler"
  if "off" not in values:
    return ("memory", result, "", "")
  return ("memory", f"{result}, {values['peak_bytes'] / 1e9:,.3f} at the peak",
          f"{values['off']:+.1%}", "")


def _trace(values: Json) -> Iterator[tuple[str, str, str, str]]:
  """The classes of a trace, largest first."""
  if not values.get("kernels"):
    yield ("trace", "no kernels in the profile", "", "")
    return
  busy = values["busy_seconds"]
  classes = ", ".join(f"{name} {seconds / busy:.0%}" for name, seconds in values["seconds"].items())
  yield ("trace", f"{busy * 1e3:,.2f} ms in {values['kernels']:,} kernels: {classes}",
         f"{busy / values['span_seconds']:.0%} busy", "")


def _rivals(label: str, values: Json) -> Iterator[tuple[str, str, str, str]]:
  """Ours and the rivals' of a task of `benchmarks.step` or a workload of `benchmarks.sampler`."""
  sides = {side: row for side, row in values.items()
           if isinstance(row, dict) and "tokens_per_second" in row}
  for side, row in sides.items():
    yield (f"{label}, {side}", f"{row['tokens_per_second']:,.0f} tokens/s, {row['seconds']:.3f} s",
           "", "")
  if not sides:
    for name, inner in values.items():
      if isinstance(inner, dict) and any(isinstance(x, dict) for x in inner.values()):
        yield from _rivals(name, inner)
