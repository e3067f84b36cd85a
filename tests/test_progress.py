"""The bar of decoding: it moves with tokens, and its estimate is right within a factor of two after a minute."""

import math
import random
from collections.abc import Iterator
from io import StringIO

import pytest

from llm2.common.progress import DecodingBar

FORWARD, ROW = 0.06, 0.0031  # seconds of a forward and of a row in it: 135 million parameters on one CPU core
LENGTHS = {"sentences": (22, 0.4, 64), "a limit never reached": (22, 0.4, 512), "steps": (110, 0.4, 512)}


def decoding(mean: float, spread: float, limit: int, batch: int, prompts: int, told: bool) -> Iterator[tuple]:
    """(seconds so far, bar) at each forward of continuous batching, where each prompt has 8 rows.

    Args:
        spread: of the logarithm of a row's length.
        told: whether the bar hears of each token, as from our engine, or of finished prompts alone.
    """
    generator, samples = random.Random(0), 8
    lengths = {
        (prompt, sample): min(limit, max(1, round(mean * math.exp(generator.gauss(0, spread) - spread**2 / 2))))
        for prompt in range(prompts)
        for sample in range(samples)
    }
    bar = DecodingBar(prompts * samples, limit, samples, unit="problem", file=StringIO())
    waiting, running, ended, seconds = list(lengths)[::-1], {}, {}, 0.0
    while waiting or running:
        while waiting and len(running) < batch:
            running[waiting.pop()] = 0
        seconds += FORWARD + ROW * len(running)
        for row in list(running):
            running[row] += 1
            if told:
                bar.on_token(*row)
            if running[row] == lengths[row]:
                del running[row]
                ended.setdefault(row[0], []).append([0] * lengths[row])
                if len(ended[row[0]]) == samples:
                    bar.on_finished(row[0], ended[row[0]])
        yield seconds, bar


@pytest.mark.one_in(4)
@pytest.mark.parametrize("batch", [16, 128])
@pytest.mark.parametrize("shape", LENGTHS.values(), ids=LENGTHS)
def test_the_estimate_is_within_a_factor_of_two_from_the_first_minute_on(shape, batch):
    states = [(seconds, bar.share) for seconds, bar in decoding(*shape, batch, prompts=300, told=True)]
    total, last = states[-1]
    assert total > 180 and last == pytest.approx(1.0)
    for seconds, share in states:
        if seconds > 60:
            assert 0.5 <= seconds / share / total <= 2, f"after {seconds:.0f} of {total:.0f} s"


def test_the_bar_never_stands_still_for_long():
    states = [(seconds, bar.bar.n) for seconds, bar in decoding(110, 0.4, 512, 128, prompts=300, told=True)]
    for (_, before), (_, after) in zip(states, states[60:], strict=False):  # some 25 s
        assert after > before
    assert states[-1][1] == 300


def test_an_engine_that_shows_no_tokens_counts_what_is_finished():
    seen = [bar.bar.n for _, bar in decoding(22, 0.4, 64, 16, prompts=20, told=False)]
    assert seen == sorted(seen) and seen[-1] == 20 and len(set(seen)) > 15


def test_a_bar_is_full_at_its_end_but_not_after_an_error():
    with DecodingBar(8, 10, 4, file=StringIO()) as done:
        done.on_token(0, 0)
    assert done.bar.n == 2
    with pytest.raises(KeyboardInterrupt), DecodingBar(8, 10, 4, file=StringIO()) as interrupted:
        interrupted.on_token(0, 0)
        raise KeyboardInterrupt
    assert interrupted.bar.n < 1
