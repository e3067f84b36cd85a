"""Draws figs/overview.svg and figs/overview.png, the method at a glance: `python -m figs.draw_overview`.

All numbers are illustrative; the guided probabilities are computed as softmax(z + beta * s). Plots of measured figures
are in llm2.evaluation.report, from which the colours come.
"""

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from llm2.evaluation.report.palette import INK, SYSTEM1, SYSTEM2, WRONG

RIGHT = "#2A7F6F"  # always beside a tick
FAINT, GREY = "#6B7280", "#9AA0A8"  # text, bars
PALE1, PALE2, PANEL = "#EAF1F8", "#FDF3DC", "#F6F7F9"
ALPHA, BETA = 0.1, 0.25
# Illustrative: token, System 1's probability, System 2's score (none: not plausible, so never scored)
CANDIDATES = [("*", 0.52, -2.4), ("/", 0.34, 3.1), ("+", 0.10, -1.9), ("clips", 0.02, None)]
GOLD, NEGATIVE = "/", "*"
ROLLOUTS = {"/": (1, 1, 1, 0, 1, 1, 1, 1), "*": (0, 0, 0, 1, 0, 0, 0, 0)}  # illustrative; 1: right answer
WIDTH, HEIGHT = 90.0, 77.0  # tenths of an inch


def main() -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "llm2", "font.family": "DejaVu Sans"})
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    draw_decoding(axes)
    draw_training(axes)
    text(axes, WIDTH / 2, 1.2, "All numbers in this figure are illustrative.", size=8.5, color=FAINT, style="italic")
    folder = Path(__file__).parent
    figure.savefig(folder / "overview.svg", metadata={"Date": None})
    figure.savefig(folder / "overview.png", dpi=200)


def draw_decoding(axes: Axes) -> None:
    """The upper panel: one step, candidates in rows, System 1, System 2 and their sum in columns."""
    box(axes, 1, 33.5, 88, 42.5, PANEL)
    text(axes, 3, 73.4, "Decoding: System 1 proposes, System 2 judges", size=12.5, weight="bold", ha="left")
    question = "Natalia sold clips to 48 of her friends in April, and half as many in May. How many altogether?"
    text(axes, 3, 70.2, question, size=9.5, ha="left", style="italic")
    text(axes, 3, 66.9, "Natalia sold 48", size=10.5, ha="left", family="DejaVu Sans Mono", weight="bold")
    box(axes, 16.3, 65.75, 3.2, 2.5, "white", edge=INK, style="round,pad=0,rounding_size=0.5")
    text(axes, 17.9, 66.9, "?", size=10.5, weight="bold")
    columns = [(11.5, 20.5, SYSTEM1, PALE1), (39.5, 20.5, SYSTEM2, PALE2), (66.5, 20.5, INK, "white")]
    heads = [
        ("System 1", "language model: softmax(z)"),
        ("System 2", "verifier: scores s"),
        ("Together", "softmax(z + β s)"),
    ]
    for (x, width, color, pale), (head, sub) in zip(columns, heads, strict=True):
        box(axes, x, 39.8, width, 23.8, pale, edge=color)
        text(axes, x + width / 2, 61.5, head, size=11.5, weight="bold", color=color if color != SYSTEM2 else "#9A6A00")
        text(axes, x + width / 2, 58.9, sub, size=9)
    text(axes, 35.75, 51.2, "+ β ×", size=11, weight="bold")
    text(axes, 35.75, 48.7, f"β = {BETA}", size=8.5, color=FAINT)
    text(axes, 10, 58.9, "next token", size=9, ha="right", color=FAINT)
    text(axes, 63.25, 51.2, "=", size=15, weight="bold")
    draw_candidates(axes)
    draw_choices(axes)


def draw_candidates(axes: Axes) -> None:
    """A row a candidate: its probability, its score, its guided probability; the implausible one below a line."""
    guided = guided_probabilities()
    for row, (token, p, score) in enumerate(CANDIDATES):
        y = 55.2 - 4.35 * row
        plausible = score is not None
        text(axes, 10, y, token, size=12, ha="right", family="DejaVu Sans Mono", weight="bold", color=mark(token))
        label = f"{p:.2f}" if plausible else f"{p:.2f}  < {ALPHA} max p"
        bar(axes, 13.5, y, 13 * p / 0.7, SYSTEM1 if plausible else GREY, label)
        if plausible:
            score_bar(axes, 49, y, score)
            bar(axes, 68.5, y, 13 * guided[token] / 0.7, SYSTEM2 if token == GOLD else GREY, f"{guided[token]:.2f}")
        else:
            text(axes, 49.75, y, "not scored", size=9, color=FAINT)
            text(axes, 68.5, y, "ruled out", size=9, color=FAINT, ha="left")
    cut = 55.2 - 4.35 * 2.5
    axes.plot([4.5, 87], [cut, cut], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))


def draw_choices(axes: Axes) -> None:
    """What greedy decoding takes before and after, and where that leads."""
    text(axes, 21.75, 37.6, "greedy takes  *", size=10, weight="bold", color=WRONG)
    text(axes, 21.75, 35.3, "✗  48 * 2 = 96 clips in May", size=9.5, color=WRONG)
    text(axes, 76.75, 37.6, "greedy takes  /", size=10, weight="bold", color=RIGHT)
    text(axes, 76.75, 35.3, "✓  48 / 2 = 24 clips in May", size=9.5, color=RIGHT)
    arrow(axes, (37, 36.0), (62.5, 36.0), INK)
    text(axes, 49.75, 37.6, "the choice flips", size=9.5)


def draw_training(axes: Axes) -> None:
    """The lower panel: rollouts from each candidate, the pair that is kept, the loss."""
    box(axes, 1, 2.8, 88, 29, PANEL)
    text(
        axes,
        3,
        29.3,
        "Training: System 2 learns from what System 1's tokens lead to",
        size=12.5,
        weight="bold",
        ha="left",
    )
    heads = [(22.5, "1  roll out from each plausible token"), (55.6, "2  keep the pair"), (78, "3  pairwise loss")]
    for x, head in heads:
        text(axes, x, 26.1, head, size=10, weight="bold")
    text(axes, 3, 15.2, "… sold 48", size=10.5, ha="left", family="DejaVu Sans Mono", weight="bold")
    for token, y in ((GOLD, 19.7), (NEGATIVE, 10.9)):
        draw_rollouts(axes, token, y)
    text(axes, 22.5, 4.8, "System 1 completes each; the answers are graded", size=8.5)
    arrow(axes, (42.7, 15.2), (45.9, 15.2), INK)
    box(axes, 46.4, 10.4, 18.4, 9.6, "white", edge=INK)
    for x, value, role, token in (
        (49.6, "[54,", "position", ""),
        (55.2, "611,", "gold", "/"),
        (60.8, "353]", "negative", "*"),
    ):
        color = mark(token)
        text(axes, x, 17.4, value, size=11, family="DejaVu Sans Mono", weight="bold", color=color)
        text(axes, x, 14.7, role, size=8.5, color=color)
        text(axes, x, 12.3, token, size=11, family="DejaVu Sans Mono", weight="bold", color=color)
    text(axes, 55.6, 6.9, "only if the qualities clearly differ:", size=8.5)
    text(axes, 55.6, 4.8, "an equally good token is no negative", size=8.5)
    arrow(axes, (65.2, 15.2), (68.4, 15.2), INK)
    box(axes, 69, 10.4, 18, 9.6, PALE2, edge=SYSTEM2)
    text(axes, 78, 17.4, "−log σ( s(/) − s(*) )", size=10.2, weight="bold")
    text(axes, 78, 14.6, "↑  raises s(/)", size=9.5, color=RIGHT)
    text(axes, 78, 12.2, "↓  lowers s(*)", size=9.5, color=WRONG)
    text(axes, 78, 6.9, "System 2 starts as a copy of", size=8.5)
    text(axes, 78, 4.8, "System 1 with a scalar head", size=8.5)


def draw_rollouts(axes: Axes, token: str, y: float) -> None:
    """A branch: the token, a line per rollout, a mark for each answer, the share of right ones."""
    color = mark(token)
    axes.add_patch(FancyArrowPatch((13.2, 15.2), (16.3, y), arrowstyle="-", color=INK, linewidth=1.2))
    box(axes, 16.4, y - 1.6, 3.4, 3.2, "white", edge=color)
    text(axes, 18.1, y, token, size=12, family="DejaVu Sans Mono", weight="bold", color=color)
    rollouts = ROLLOUTS[token]
    for index, right in enumerate(rollouts):
        end = y + 3.5 - 1.0 * index
        axes.plot([20, 22.5, 30], [y, end, end], color=SYSTEM1, linewidth=1, alpha=0.75, solid_joinstyle="round")
        text(axes, 31, end, "✓" if right else "✗", size=8.5, color=RIGHT if right else WRONG, weight="bold")
    text(axes, 33, y + 1.1, "gold" if token == GOLD else "negative", size=9.5, ha="left", color=color, weight="bold")
    text(axes, 33, y - 1.2, f"quality {sum(rollouts)}/{len(rollouts)}", size=9.5, ha="left")


def guided_probabilities() -> dict[str, float]:
    """softmax(z + beta * s) on the plausible set, where z = log p (arXiv 2412.20372)."""
    weights = {token: p * math.exp(BETA * score) for token, p, score in CANDIDATES if score is not None}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def mark(token: str) -> str:
    """The colour of a token: right, wrong or neither."""
    return {GOLD: RIGHT, NEGATIVE: WRONG}.get(token, INK)


def bar(axes: Axes, x: float, y: float, width: float, color: str, label: str) -> None:
    axes.add_patch(Rectangle((x, y - 1.05), width, 2.1, color=color, linewidth=0))
    text(axes, x + width + 0.7, y, label, size=9.5, ha="left")


def score_bar(axes: Axes, zero: float, y: float, score: float) -> None:
    """A bar to the right of zero for a good token, to the left for a bad one."""
    axes.plot([zero, zero], [y - 1.7, y + 1.7], color=INK, linewidth=0.8)
    axes.add_patch(Rectangle((zero, y - 1.05), 1.75 * score, 2.1, color=SYSTEM2, linewidth=0))
    side = 1 if score > 0 else -1
    label = f"{score:+.1f}".replace("-", "−")
    text(axes, zero + 1.75 * score + 0.6 * side, y, label, size=9.5, ha="left" if side > 0 else "right")


def text(
    axes: Axes, x: float, y: float, content: str, *, size: float, ha: str = "center", color: str = INK, **style
) -> None:
    axes.text(x, y, content, fontsize=size, ha=ha, va="center_baseline", color=color, **style)


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    *,
    edge: str = "none",
    style: str | None = None,
) -> None:
    style = style or "round,pad=0,rounding_size=0.9"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.3))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.3))


if __name__ == "__main__":
    main()
