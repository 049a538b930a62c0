"""``python report.py FOLDER``: side_by_side.jsonl as a Markdown table, and FOLDER/side_by_side.svg."""

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from arms import ARMS
from records import Record, attempts, finished

TITLES = {
    "cppo": "`cppo train`, CPPO",
    "grpo": "`cppo train`, GRPO",
    "stock": "stock verl, GRPO",
    "trl": "TRL's GRPOTrainer",
}
COLOURS = {"cppo": "tab:red", "grpo": "tab:orange", "stock": "tab:blue", "trl": "tab:green"}
# Measure -> its title and how a value is shown.
MEASURES = {
    "start_up": ("command to first step begun, s", "{:.1f}"),
    "step": ("step, s", "{:.2f}"),
    "tokens_per_second": ("tokens a second of step", "{:.0f}"),
    "rollout": ("rollouts of a step, s", "{:.2f}"),
    "evaluation": ("evaluation, s", "{:.1f}"),
    "before": ("accuracy before", "{:.1%}"),
    "after": ("accuracy after", "{:.1%}"),
    "wall": ("command to last step done, s", "{:.0f}"),
}
# Those whose ratios to our default say something.
COMPARED = ("step", "tokens_per_second", "wall")


def summary(attempt: list[Record]) -> dict[str, float]:
    """What one finished attempt comes to: medians over its steps, sums over its evaluations.

    The first step is left out of the medians where there are others: it also compiles and warms up. Seconds from the
    command are without the evaluations before them.
    """
    steps = [record for record in attempt if record["event"] == "step"]
    steady = steps[1:] or steps
    evaluations = [record for record in attempt if record["event"] == "evaluation"]
    return {
        "start_up": evaluations[0]["at"] - evaluations[0]["seconds"],
        "step": statistics.median(step["seconds"] for step in steady),
        "tokens_per_second": sum(step["tokens"] for step in steady) / sum(step["seconds"] for step in steady),
        "rollout": statistics.median(step["rollout_seconds"] for step in steady),
        "evaluation": statistics.median(evaluation["seconds"] for evaluation in evaluations),
        "before": evaluations[0]["accuracy"],
        "after": evaluations[-1]["accuracy"],
        "wall": clock(attempt)[-1][0],
    }


def clock(attempt: list[Record]) -> list[tuple[float, float, float]]:
    """(seconds from the command, seconds from the first step's begin, accuracy) of each evaluation.

    The evaluations themselves count in neither.
    """
    points, evaluated, start_up = [], 0.0, None
    for record in attempt:
        if record["event"] == "evaluation":
            begun = record["at"] - record["seconds"] - evaluated
            start_up = begun if start_up is None else start_up
            points.append((begun, begun - start_up, record["accuracy"]))
            evaluated += record["seconds"]
    return points


def table(runs: dict[str, dict[int, dict[str, float]]]) -> Iterator[str]:
    """Rows of medians and ranges over repeats; ``runs``: arm -> repeat -> summary."""
    yield "| arm | repeats | " + " | ".join(title for title, _ in MEASURES.values()) + " |"
    yield "|---" * (2 + len(MEASURES)) + "|"
    for arm, repeats in runs.items():
        cells = [_spread([run[name] for run in repeats.values()], shown) for name, (_, shown) in MEASURES.items()]
        yield f"| {TITLES[arm]} | {len(repeats)} | " + " | ".join(cells) + " |"


def ratios(runs: dict[str, dict[int, dict[str, float]]]) -> Iterator[str]:
    """Each other arm divided by our default within a repeat."""
    base = runs["cppo"]
    titles = ["arm / " + TITLES["cppo"], "pairs", *(MEASURES[name][0] for name in COMPARED), "accuracy after, points"]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for arm, repeats in runs.items():
        pairs = [(repeats[number], base[number]) for number in sorted(repeats.keys() & base.keys())]
        if arm == "cppo" or not pairs:
            continue
        cells = [_spread([run[name] / ours[name] for run, ours in pairs], "{:.3f}") for name in COMPARED]
        cells.append(_spread([100 * (run["after"] - ours["after"]) for run, ours in pairs], "{:+.1f}"))
        yield f"| {TITLES[arm]} | {len(pairs)} | " + " | ".join(cells) + " |"


def _spread(values: list[float], shown: str) -> str:
    """Median and, of several, range."""
    if not values:
        return "-"
    text = shown.format(statistics.median(values))
    return text if len(values) == 1 else f"{text} ({shown.format(min(values))} to {shown.format(max(values))})"


def failures(tried: dict[tuple[int, str], list[list[Record]]]) -> Iterator[str]:
    """Every attempt that failed, with the last lines of its log; one that a later attempt made good as well."""
    for (repeat, arm), own in tried.items():
        for number, attempt in enumerate(own, start=1):
            if finished(attempt):
                continue
            last, where = attempt[-1], f"{TITLES[arm]}, repeat {repeat}, attempt {number}"
            yield f"Failed: {where}, after {last['seconds']:.0f} s with status {last['status']}; the end of its log:"
            yield "\n```text\n" + "\n".join(last["log"]) + "\n```\n"


def plot(done: dict[str, dict[int, list[Record]]], file: Path) -> None:
    """Held-out accuracy against seconds, from the command and from the first step; a line is one repeat."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, constrained_layout=True)
    for arm, repeats in done.items():
        for number, attempt in enumerate(repeats.values()):
            with_start, without, accuracy = zip(*clock(attempt), strict=True)
            for axis, seconds in zip(axes, (with_start, without), strict=True):
                label = TITLES[arm].replace("`", "") if number == 0 else None
                axis.plot(seconds, accuracy, marker="o", markersize=4, color=COLOURS[arm], alpha=0.7, label=label)
    axes[0].set(xlabel="seconds from the command, evaluations left out", ylabel="held-out accuracy")
    axes[1].set(xlabel="seconds from the begin of the first step, evaluations left out")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.savefig(file)
    plt.close(figure)


def main() -> int:
    folder = Path(sys.argv[1])
    tried = attempts(folder)
    done: dict[str, dict[int, list[Record]]] = {arm: {} for arm in ARMS}
    for (repeat, arm), own in sorted(tried.items()):
        if finished(own[-1]):
            done[arm][repeat] = own[-1]
    runs = {arm: {repeat: summary(attempt) for repeat, attempt in own.items()} for arm, own in done.items()}
    lines = [*table(runs), "", *ratios(runs), "", *failures(tried)]
    text = "\n".join(lines).rstrip() + "\n"
    print(text, end="")
    (folder / "side_by_side.md").write_text(text)
    if any(done.values()):
        plot(done, folder / "side_by_side.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
