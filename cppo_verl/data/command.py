"""``cppo prepare``."""

from pathlib import Path

from cppo_verl.data.prepare import parse_request, prepare
from cppo_verl.run.terminal import say


def prepare_files(out: Path, train: list[str], held_out: list[str], template: str, revision: str | None) -> int:
    """Write the data files and their manifest; names what was left out because an evaluation set has it."""
    training, evaluation = ([parse_request(text) for text in texts] for texts in (train, held_out))
    manifest = prepare(training, evaluation, out, template, revision, progress=say)
    for name, entry in manifest["sets"].items():
        for removed in entry["removed"]:
            if removed["reason"].startswith("is in "):
                say(f"{name}: {removed['id']} {removed['reason']}: left out")
    say(f"manifest: {out / 'manifest.json'}")
    return 0
