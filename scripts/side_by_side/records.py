"""What the arms measured, read from the files that each writes, kept as lines of ``side_by_side.jsonl``.

A record is a "step" (one batch of rollouts and its updates) or an "evaluation", with ``at``, seconds from the command
to its end, and ``seconds``, how long it took. A step lasts from the end of what was before it, evaluations excluded.
An attempt opens with "started" and closes with "finished" or "failed".
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cppo_verl.run.log import EVENTS, read_lines, read_metrics, validation_score

RECORDS = "side_by_side.jsonl"

Record = dict[str, Any]


def ours_measured(folder: Path, started: float, responses: int) -> list[Record]:
    """From a run folder of ``cppo train``; ``responses``: how many a step has."""
    events = read_lines(folder / EVENTS) if (folder / EVENTS).exists() else iter(())
    first = next((event["time"] for event in events if event["event"] == "validating"), None)
    return list(_of_verl(read_metrics(folder).values(), first, started, responses))


def stock_measured(file: Path, arrivals: list[float], started: float, responses: int) -> list[Record]:
    """From verl's own file of metrics, which has no times.

    Args:
        arrivals: when the file was there, which verl makes just before the first evaluation, and each line of it.
    """
    lines = list(read_lines(file)) if file.exists() else []
    timed = [{**line["data"], "step": line["step"], "time": at} for line, at in zip(lines, arrivals[1:], strict=False)]
    return list(_of_verl(timed, arrivals[0] if arrivals else None, started, responses))


def trl_measured(file: Path, started: float) -> list[Record]:
    """From what ``trl_grpo.py`` writes."""
    lines = list(read_lines(file)) if file.exists() else []
    return [{**line, "at": line["at"] - started} for line in lines]


def _of_verl(lines: Iterable[Record], first: float | None, started: float, responses: int) -> Iterator[Record]:
    """verl's metrics of a step are written once its evaluation, if any, has ended."""
    previous = None
    for line in lines:
        at, step = line["time"], line["step"]
        accuracy = validation_score(line)
        evaluating = line.get("timing_s/testing", 0.0)
        if step == 0:
            evaluating = None if first is None else at - first
        elif previous is not None:
            yield {
                "event": "step",
                "step": step,
                "at": at - evaluating - started,
                "seconds": at - evaluating - previous,
                "tokens": round(line["response_length/mean"] * responses),
                "rollout_seconds": line["timing_s/gen"],
                "reward": line["critic/score/mean"],
            }
        if accuracy is not None:
            yield {"event": "evaluation", "step": step, "at": at - started, "seconds": evaluating, "accuracy": accuracy}
        previous = at


def attempts(folder: Path) -> dict[tuple[int, str], list[list[Record]]]:
    """(repeat, arm) -> its attempts in order, each the list of its records."""
    found: dict[tuple[int, str], list[list[Record]]] = {}
    for record in read_lines(folder / RECORDS) if (folder / RECORDS).exists() else ():
        own = found.setdefault((record["repeat"], record["arm"]), [])
        if record["event"] == "started":
            own.append([])
        own[-1].append(record)
    return found


def finished(attempt: list[Record]) -> bool:
    return attempt[-1]["event"] == "finished"


def append(folder: Path, records: list[Record]) -> None:
    with open(folder / RECORDS, "a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
