"""How much of the time of all-gathers a GPU also computes, and when it idles, from a trace that torch's profiler
exported.

    python benchmarks/trace_overlap.py trace.json.gz

Compute is what the stream with the most kernel time runs, NCCL aside; FSDP2's copies into its buffers have a stream of
their own. A kernel of NCCL's runs from its launch until its peers have sent, so waiting for a slower rank counts.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """Seconds on one GPU: of all-gather kernels, of which beside compute, and of compute kernels."""

    gather_s: float
    hidden_s: float
    compute_s: float
    num_gathers: int

    def __str__(self) -> str:
        if not self.num_gathers:
            return "no all-gather kernel in the trace"
        return (
            f"{self.num_gathers} all-gathers, {self.gather_s * 1e3:.1f} ms, of which "
            f"{self.hidden_s / self.gather_s:.0%} beside compute ({self.compute_s * 1e3:.1f} ms in all)"
        )


def read_trace(path: str | Path) -> dict[str, Any]:
    """A trace as `export_chrome_trace` writes it, compressed or not."""
    content = Path(path).read_bytes()
    return json.loads(gzip.decompress(content) if str(path).endswith(".gz") else content)


def overlap(trace: dict[str, Any]) -> Overlap:
    """Compare the all-gathers of a trace with the kernels of its busiest stream."""
    gathers: list[Interval] = []
    streams: dict[Any, list[Interval]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") != "kernel":
            continue
        interval = (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        if "nccl" not in event["name"].lower():
            streams[event["args"]["stream"]].append(interval)
        elif "AllGather" in event["name"]:
            gathers.append(interval)
    compute = merge(max(streams.values(), key=_total, default=[]))
    gathers = merge(gathers)
    hidden = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in gathers
        for other_start, other_end in compute
    )
    return Overlap(_total(gathers), hidden, _total(compute), len(gathers))


def idle_lines(trace: dict[str, Any], longest: int = 10) -> list[str]:
    """When the GPU had nothing to do between the first and the last kernel: a sum, and the longest times."""
    events = [event for event in trace["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events.sort(key=lambda event: event["ts"])
    gaps: list[tuple[float, float, str, str]] = []
    end, last = events[0]["ts"], events[0]["name"]
    for event in events:
        if event["ts"] > end:
            gaps.append((event["ts"] - end, event["ts"] - events[0]["ts"], last, event["name"]))
        if event["ts"] + event["dur"] > end:
            end, last = event["ts"] + event["dur"], event["name"]
    short, long = ([gap for gap, *_ in gaps if (gap > 20) is kind] for kind in (False, True))
    lines = [
        f"  idle {sum(short) / 1e3:.1f} ms in {len(short)} gaps of up to 20 us, {sum(long) / 1e3:.1f} ms in "
        f"{len(long)} longer ones; {(end - events[0]['ts']) / 1e3:.1f} ms from first to last"
    ]
    return lines + [
        f"    {gap / 1e3:6.2f} ms, {at / 1e3:6.1f} ms after the start, between {before[:50]} and {after[:50]}"
        for gap, at, before, after in sorted(gaps, reverse=True)[:longest]
    ]


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times without repetition, in order. Kernels that follow at once become one interval."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _total(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(f"{path}: {overlap(read_trace(path))}")
