"""The kept samples of a run's validations, ``validation/STEP.jsonl``."""

from pathlib import Path

from cppo_verl.run.files import DamagedFile, numbered_lines

# (prompt text, gold)
Problem = tuple[str, str]


def validations(folder: Path) -> dict[int, Path]:
    """Step -> file, ascending, of a run's validation folder."""
    return dict(sorted((int(path.stem), path) for path in folder.glob("*.jsonl") if path.stem.isdecimal()))


def verdicts(path: Path) -> dict[str, dict[Problem, list[bool]]]:
    """data source -> problem (prompt text, gold) -> one verdict per sample; samples without a verdict are left out."""
    result: dict[str, dict[Problem, list[bool]]] = {}
    for number, sample in numbered_lines(path):
        if "input" not in sample or not isinstance(sample.get("acc", 0), int | float | None):
            raise DamagedFile(path, number, "is no sample of a validation", "mend or delete that line")
        if sample.get("acc") is not None:
            source = result.setdefault(str(sample.get("data_source", "validation")), {})
            source.setdefault((sample["input"], str(sample.get("gts"))), []).append(sample["acc"] > 0.5)
    return result
