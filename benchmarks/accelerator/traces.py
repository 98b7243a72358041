"""Where a device's time goes by kind of kernel, from a profile."""

import pathlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from s2d_jax import timing

# The first class whose pattern is in a kernel's name counts, then in that of the HLO operation.
CLASSES = (
    ("attention", r"fmha|flash|sdpa|attention"),
    ("product", r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitk|wgmma|(^|_)dot"),
    ("collective", r"nccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all"),
    ("sort", r"sort|top_?k|radix"),
    ("scatter", r"scatter|dynamic.update"),
    ("reduction", r"reduce|softmax|norm"),
    ("copy", r"memcpy|memset|copy|transpose|concatenate|gather|slice"),
    ("fusion", r"fusion|triton|loop_|input_|wrapped_"),
)
# Lines that the profiler derives from a GPU's streams.
SUMMARIES = {"Steps", "XLA Modules", "XLA Ops", "XLA TraceMe", "Framework Name Scope",
             "Framework Ops", "Source code", "TensorFlow Name Scope", "TensorFlow Ops",
             "Launch Stats"}
LARGEST = 12  # kernels that are listed by name
Event = tuple[str, str, float, float]  # kernel, HLO operation, start and duration in ns


def class_of(kernel: str, operation: str = "") -> str:
  """The class of a kernel, by its name or by that of the HLO operation that it computes."""
  for name in (kernel, operation):
    for found, pattern in CLASSES:
      if re.search(pattern, name, re.I):
        return found
  return "other"


def sums(events: list[Event]) -> dict[str, Any]:
  """Seconds by class, of the largest kernels, and from the first start to the last end."""
  if not events:
    return {"kernels": 0}
  by_class: Counter[str] = Counter()
  by_name: Counter[str] = Counter()
  count: Counter[str] = Counter()
  for kernel, operation, _, duration in events:
    by_class[class_of(kernel, operation)] += duration / 1e9
    by_name[kernel[:80]] += duration / 1e9
    count[kernel[:80]] += 1
  start = min(start for _, _, start, _ in events)
  end = max(start + duration for _, _, start, duration in events)
  return {"kernels": len(events), "busy_seconds": sum(by_class.values()),
          "span_seconds": (end - start) / 1e9, "seconds": dict(by_class.most_common()),
          "largest": [{"kernel": name, "class": class_of(name), "count": count[name],
                       "seconds": seconds} for name, seconds in by_name.most_common(LARGEST)]}


def of(run: Callable[[], Any]) -> dict[str, Any]:
  """The `sums` of what `run` does on the device; `lines` names the profile's lines."""
  with tempfile.TemporaryDirectory() as folder:
    with timing.profiler(folder):
      jax.block_until_ready(run())
    events = []
    lines = []
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
      profile = jax.profiler.ProfileData.from_file(str(path))
      lines += [f"{plane.name}: {line.name}" for plane in profile.planes for line in plane.lines]
      events += device_events(profile)
    return sums(events) | {"lines": sorted(set(lines))[:20]}


def device_events(profile: jax.profiler.ProfileData) -> Iterator[Event]:
  """The kernels of a profile: those on a GPU's streams; elsewhere the HLO operations."""
  for plane in profile.planes:
    on_gpu = plane.name.startswith("/device:GPU")
    for line in plane.lines:
      # Some lines of a GPU sum up its streams: with them each kernel would count twice.
      if on_gpu and line.name in SUMMARIES:
        continue
      for event in line.events:
        operation = str(dict(event.stats).get("hlo_op", ""))
        if on_gpu or operation:
          yield event.name, operation, event.start_ns, event.duration_ns
