"""``cppo plot`` and ``cppo table``."""

from pathlib import Path

from cppo_verl.run.files import write_atomically
from cppo_verl.run.terminal import say, warn


def plot(runs: list[Path], out: Path | None) -> int:
    """Draw the plots of one or several runs and print their paths."""
    from cppo_verl.figures.plots import plot_runs

    target = out or (runs[0] / "plots" if len(runs) == 1 else Path("plots"))
    written = plot_runs(runs, target, say=lambda text: warn(f"cppo plot: {text}"))
    for path in written:
        say(path)
    if not written:
        say("there are no numbers to draw yet")
    return 0


def table(runs: list[Path], kind: str, at: str, until: int | None, out: Path | None) -> int:
    """Print the table, or write it to ``out``.

    Args:
        kind: "markdown", "json" or "latex".
    """
    from cppo_verl.figures.table import as_json, latex, markdown, read_rows

    write = {"markdown": markdown, "json": as_json, "latex": latex}[kind]
    text = write(read_rows(runs, at, until))
    if out:
        write_atomically(out, text)
        say(out)
    else:
        say(text.rstrip("\n"))
    return 0
