"""``cppo inspect``: reads the dumped steps of a run and writes the page."""

from pathlib import Path

import numpy as np

from cppo_verl.inspection.page import page
from cppo_verl.inspection.presets import presets
from cppo_verl.inspection.rows import Step, read_step, steps_of
from cppo_verl.inspection.vocabulary import texts
from cppo_verl.problems import ConfigError
from cppo_verl.run.files import write_atomically
from cppo_verl.run.folder import read_config
from cppo_verl.run.terminal import plain, say

_LARGE = 50 * 2**20  # bytes: what a browser takes a while for


def inspect(run: Path, step: int | None, out: Path | None, tokens: int) -> int:
    """Write the page of a run; returns the exit status.

    Args:
        step: None for every dumped step.
        out: the file to write; None for ``inspect.html`` in the run folder.
        tokens: how many to show of a step, about; whole groups.

    Raises:
        ConfigError: it is no run, has no such dumped step, or one cannot be read.
    """
    config, found = read_config(run), steps_of(run)
    if not found:
        raise ConfigError(f"{run} has no dumped step; train with run.dump_steps=[1] or run.inspect_every=50")
    if step is not None and step not in found:
        there = ", ".join(map(str, found))
        raise ConfigError(f"--step={step}: {run} has no dump of it; give one of {there}")
    shuffled = config.method.get("weights") == "shuffled"
    numbers = found if step is None else [step]
    steps = [read_step(number, found[number], tokens, shuffled) for number in numbers]
    words, decoded = texts(config, _ids(steps))
    notes = "" if decoded else "The model's tokenizer.json was not found on this machine: tokens are shown by number."
    name = plain(str(config.run.get("name") or run.name))
    content = page(name, steps, presets(config), words, f"Divergence: {config.divergence.name}. {notes}".strip())
    target = out or run / "inspect.html"
    if target.is_dir():
        raise ConfigError(f"--out={target}: is a folder; give a file, e.g. {target / 'inspect.html'}")
    write_atomically(target, content)
    for one in steps:
        left = f"; {one.left_out} more responses are left out (--tokens={tokens})" if one.left_out else ""
        say(f"step {one.number}: {len(one.responses)} responses, {len(one.columns['id']):,} tokens{left}")
    size = len(content.encode())
    say(f"{target}  {size / 2**20:.1f} MiB" + (": large; give --step or fewer --tokens" if size > _LARGE else ""))
    return 0


def _ids(steps: list[Step]) -> list[int]:
    """Every token id that the page shows."""
    columns = [step.columns[name] for step in steps for name in ("id", "cell_id")]
    prompts = [np.array(prompt, dtype=np.int32) for step in steps for prompt in step.prompts]
    return np.unique(np.concatenate([*columns, *prompts])).tolist()
