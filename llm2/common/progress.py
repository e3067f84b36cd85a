"""A progress bar that moves with every token, for rows of unknown length."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm


class DecodingBar:
    """Counts tokens and estimates their total, assuming that rows not yet started are as long on average as the others.

    While rows are still running, their mean length is bounded from below by the tokens they have and from above by the
    longest row so far or, while few have ended, by `limit`. The estimate is the geometric mean of both bounds.

    Args:
        total: number of rows, displayed in units of `rows_per_unit`.
        limit: tokens of a row at most.
        options: tqdm's.
    """

    def __init__(self, total: int, limit: int, rows_per_unit: int = 1, **options: Any) -> None:
        self.total, self.limit, self.rows_per_unit = total, limit, rows_per_unit
        self.running: Counter[tuple[int, int]] = Counter()  # (prompt, sample) -> its tokens
        self.tokens, self.ended, self.ended_tokens, self.longest = 0, 0, 0, 1
        self.bar = tqdm(total=total // rows_per_unit, mininterval=1, miniters=0, smoothing=0, **options)

    def __enter__(self) -> "DecodingBar":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.bar.n = self.bar.total
        self.bar.close()

    def on_token(self, prompt: int, sample: int, *_: int) -> None:
        """A running row has one more token."""
        self.tokens += 1
        self.running[prompt, sample] += 1
        self.longest = max(self.longest, self.running[prompt, sample])
        self._draw()

    def on_finished(self, prompt: int, rows: Sequence[Sequence[int]]) -> None:
        """All rows of a prompt have ended with these new tokens, whether or not `on_token` reported them."""
        self.ended += len(rows)
        for sample, row in enumerate(rows):
            self.tokens += len(row) - self.running.pop((prompt, sample), 0)
            self.ended_tokens += len(row)
            self.longest = max(self.longest, len(row))
        self._draw()

    def _draw(self) -> None:
        self.bar.n = round(self.share * self.total / self.rows_per_unit, 1)
        self.bar.update(0)

    @property
    def share(self) -> float:
        """Estimated share of all tokens that are decoded, in [0, 1]."""
        begun = self.ended + len(self.running)
        longest = self.longest ** (self.ended / begun) * max(self.limit, self.longest) ** (1 - self.ended / begun)
        most = self.ended_tokens + len(self.running) * longest
        expected = math.sqrt(self.tokens * most) / begun if self.tokens else 1.0
        return min(1.0, self.tokens / (expected * max(self.total, begun)))
