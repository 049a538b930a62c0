"""The model card of a trained checkpoint, filled from its run folder."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cppo_verl.checkpoint.find import Checkpoint
from cppo_verl.problems import ConfigError
from cppo_verl.run.files import read_json
from cppo_verl.run.folder import MANIFEST, read_attempts, read_config
from cppo_verl.run.log import accuracies, read_metrics

_UNKNOWN = "not known: this checkpoint lies in no run folder"


def model_card(checkpoint: Checkpoint) -> str:
    """README.md (Markdown with the hub's YAML header) of a merged checkpoint; what the run did not write is said so."""
    run = checkpoint.run
    if run is None or checkpoint.step is None:
        return _page(ModelCardData(library_name="transformers"), checkpoint.name, [f"Origin {_UNKNOWN}."])
    try:
        return _card_of(run, checkpoint.step)
    except (AttributeError, IndexError, KeyError, TypeError, OmegaConfBaseException) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ConfigError(f"{run}: its config.yaml, {MANIFEST} or reports are damaged ({reason})") from None


def _card_of(run: Path, step: int) -> str:
    config = read_config(run)
    base, in_hub = str(config.actor_rollout_ref.model.path), not Path(config.actor_rollout_ref.model.path).is_absolute()
    header = ModelCardData(
        # A folder's path says nothing to others.
        base_model=base if in_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "rlvr", "verl", str(config.method.name)],
    )
    name = f"{Path(base).name}, {config.method.name}" if in_hub else str(config.run.name)
    name += f", step {step}"
    sections = [
        _training(config, step),
        _validation(run, step),
        _evaluations(run, step),
    ]
    return _page(header, name, [*sections, _origin(run), _loading()])


# The folders of an absolute path, or of one from ~ or .., wherever a word may begin; not those of a URL or a hub id.
_FOLDERS = re.compile(r"(?<![\w./~-])(?:file://(?=/)|~[\w.-]*(?=/)|\.\.?(?=/))?/(?!/)(?:[^/,\[\]{}'\"=:]+/)*(?=[^/])")


def _without_folders(text: str) -> str:
    """Of local paths only the last name: a card is published, and the rest is of one machine and its user."""
    return _FOLDERS.sub("", text)


def _plain(word: str) -> str:
    """A command's word without folders, and without Hydra's quotes where the value needs none."""
    return re.sub(r"^([^=]+)='([\w.+-]*)'$", r"\1=\2", _without_folders(word))


def _page(header: ModelCardData, title: str, sections: list[str]) -> str:
    return f"---\n{header.to_yaml()}\n---\n\n# {title}\n\n" + "\n\n".join(sections) + "\n"


def _table(rows: list[tuple[str, Any]], header: tuple[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"| {header[0]} | {header[1]} |", "|---|---|", *lines])


def _training(config: DictConfig, step: int) -> str:
    method = {str(name): config.method[name] for name in config.method}
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    files = [data.train_files] if isinstance(data.train_files, str) else data.train_files
    rows = [
        ("base model", f"`{_without_folders(str(config.actor_rollout_ref.model.path).rstrip('/'))}`"),
        ("step", f"{step} of {config.trainer.total_training_steps}"),
        *((f"`method.{key}`", f"`{json.dumps(value)}`") for key, value in method.items() if not key.startswith("_")),
        ("divergence", f"`{config.divergence.name}`, k = {config.divergence.k}"),
        ("training data", f"`{', '.join(map(_without_folders, files))}`"),
        ("prompts x responses a step", f"{data.train_batch_size} x {rollout.n}"),
        ("prompts a minibatch", actor.ppo_mini_batch_size),
        ("longest prompt, response", f"{data.max_prompt_length}, {data.max_response_length} tokens"),
        ("learning rate", actor.optim.lr),
        ("sampling", f"temperature {rollout.temperature}, top_p {rollout.top_p}"),
        ("seed", config.run.seed),
    ]
    return "## Training\n\nReinforcement learning from verifiable rewards by cppo_verl on verl.\n\n" + _table(
        rows, ("setting", "value")
    )


def _validation(run: Path, step: int) -> str:
    scores = accuracies(read_metrics(run).get(step, {})).values()
    if not scores:
        return f"## Validation\n\nStep {step} was not validated."
    return "## Validation\n\nDuring training, at this step.\n\n" + _table(
        [(label, f"{value:.1%}") for label, value in scores], ("set", "accuracy")
    )


def _evaluations(run: Path, step: int) -> str:
    rows = []
    for path in sorted((run / "eval").glob(f"step_{step}-*/report.json")):
        report = read_json(path, f"cppo report {path.parent} writes it again", "benchmarks", "n")
        for name, numbers in report["benchmarks"].items():
            error = numbers["decoding_error"]
            spread = "" if error is None else f" (decoding error {100 * error:.1f} points)"
            rows.append((f"{name} Avg@{report['n']}, {path.parent.name}", f"{numbers['avg']:.1%}{spread}"))
    if not rows:
        return "## Evaluation\n\nNot evaluated by `cppo eval` when this card was written."
    return "## Evaluation\n\nBy `cppo eval`.\n\n" + _table(rows, ("benchmark", "score"))


def _origin(run: Path) -> str:
    attempts = read_attempts(run)
    if not attempts:
        return "## Origin\n\nNot known: the run's manifest names no attempt."
    last = attempts[-1]
    packages = ", ".join(f"{name} {version}" for name, version in last["packages"].items() if version)
    hardware = last["hardware"]
    devices = ", ".join(hardware["gpus"]) or f"{hardware['cores']} CPU cores ({hardware['cpu']})"
    rows = [
        ("command (of local paths the last name)", f"`{shlex.join(map(_plain, shlex.split(last['command'])))}`"),
        ("started", f"{attempts[0]['started']}, {len(attempts)} attempt(s)"),
        ("commit of cppo_verl", last["commit"] or "an installed package"),
        ("packages", packages),
        ("devices of the launching machine", devices),
    ]
    return "## Origin\n\n" + _table(rows, ("", ""))


def _loading() -> str:
    return (
        "## Loading\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n\n'
        "verl's merger writes weights that were trained with FSDP in bfloat16."
    )
