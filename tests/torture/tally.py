"""Counts what was tried, and collects what went wrong."""

import sys
from collections import Counter


class Tally:
    """What was tried and what came of it."""

    def __init__(self):
        """Starts at zero."""
        self.counts: Counter[str] = Counter()
        self.largest: dict[str, float] = {}
        self.failures: list[str] = []

    def count(self, what: str) -> None:
        """Counts one more of something, and says how many there have been."""
        self.counts[what] += 1
        print(f"\r{what}: {self.counts[what]}   failures: {len(self.failures)}   ", end="", file=sys.stderr, flush=True)

    def worst(self, what: str, value: float) -> None:
        """Keeps the largest value of something."""
        self.largest[what] = max(value, self.largest.get(what, value))

    def fail(self, what: str, why: str) -> None:
        """Records a failure and prints it."""
        self.failures.append(f"{what}: {why}")
        print(f"\nFAILED {what}: {why}", file=sys.stderr, flush=True)
