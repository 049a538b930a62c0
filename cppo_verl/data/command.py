"""``cppo prepare``."""

from pathlib import Path

from cppo_verl.data.prepare import parse_request, prepare


def prepare_files(out: Path, train: list[str], held_out: list[str], template: str, revision: str | None) -> int:
    """Write the data files and their manifest; names what was left out because an evaluation set has it."""

    def say(text: str) -> None:
        print(text, flush=True)

    training, evaluation = ([parse_request(text) for text in texts] for texts in (train, held_out))
    manifest = prepare(training, evaluation, out, template, revision, progress=say)
    for name, entry in manifest["sets"].items():
        for removed in entry["removed"]:
            if removed["reason"].startswith("is in "):
                print(f"{name}: {removed['id']} {removed['reason']}: left out")
    print(f"manifest: {out / 'manifest.json'}")
    return 0
