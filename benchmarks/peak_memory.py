"""The most host memory that this process held at once inside a block.

Sampled from /proc: the kernel's own high-water mark counts page cache and cannot be reset without privileges.
"""

from __future__ import annotations

import threading
from pathlib import Path


class PeakMemory:
    """Context manager; afterwards `before_bytes` and `peak_bytes`.

    Args:
        fields: lines of /proc/self/status to add up: ("RssAnon", "RssShmem") leaves out pages backed by files,
            ("VmRSS",) counts them.
        sample_s: time between samples.
    """

    def __init__(self, *fields: str, sample_s: float = 0.02) -> None:
        self.fields = fields
        self.sample_s = sample_s

    def __enter__(self) -> PeakMemory:
        self.before_bytes = self.peak_bytes = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self.sample_s):
            self.peak_bytes = max(self.peak_bytes, self._now())

    def _now(self) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(lines[name].split()[0]) for name in self.fields) * 1024
