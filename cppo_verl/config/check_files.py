"""Whether the model, the data and the reward function are there and can be read."""

import ast
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from cppo_verl.adapters.columns import AGENT_LOOP, TOOL_LOOP
from cppo_verl.checkpoint.find import has_weights
from cppo_verl.config.rows import inspect_rows
from cppo_verl.config.schema import shown
from cppo_verl.problems import Problem, about


def check_model(config: DictConfig) -> Iterator[Problem]:
    """A Hugging Face folder, or a hub id that can be fetched."""
    model = config.actor_rollout_ref.model
    if model.path is None:
        yield about("actor_rollout_ref.model.path", " is not set: give a Hugging Face folder or hub id")
        return
    path = Path(os.path.expanduser(model.path))
    if path.is_dir():
        yield from _check_model_folder(path)
    elif path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") != 1:
        yield about(
            "actor_rollout_ref.model.path", f"={model.path} does not exist{_maker(config, model.path)}", only_here=True
        )
    elif os.environ.get("HF_HUB_OFFLINE") == "1" and not _in_hub_cache(model.path):
        yield about(
            "actor_rollout_ref.model.path",
            f"={model.path} is not in the local hub cache, and HF_HUB_OFFLINE=1",
            only_here=True,
        )


def _maker(config: DictConfig, path: str) -> str:
    """How a recipe's model or data file comes to be there; "" for one's own."""
    tools = config.actor_rollout_ref.rollout.agent.default_agent_loop == TOOL_LOOP
    for node, recipe in (("quickstart", "tools" if tools else "quickstart"), ("smollm2", "smollm2")):
        assets = OmegaConf.select(config, f"{node}.assets")
        if assets and str(path).startswith(str(assets)):
            return f"; bash recipes/{recipe}.sh makes {node}.assets, runs/{recipe}-assets-SEED: name that, or run it"
    return ""


def _check_model_folder(path: Path) -> Iterator[Problem]:
    """A configuration that can be read, and weights; whether those are whole: cppo doctor."""
    key, file = "actor_rollout_ref.model.path", path / "config.json"
    if not file.is_file():
        yield about(key, f"={path} has no config.json: not a Hugging Face model folder")
        return
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        yield about(key, f"={path}: its config.json cannot be read ({reason}); copy the model again")
        return
    if not isinstance(content, dict) or not content.get("model_type"):
        yield about(key, f"={path}: its config.json names no model_type; give a Hugging Face model folder")
    elif not has_weights(path):
        yield about(key, f"={path} has no weights (*.safetensors or *.bin); copy the model again", only_here=True)


def check_megatron(config: DictConfig) -> Iterator[Problem]:
    """Megatron-core, which set-up does not install."""
    if config.actor_rollout_ref.actor.strategy == "megatron" and not _importable("megatron.core"):
        yield about(
            "actor_rollout_ref.actor.strategy",
            "=megatron: Megatron-core is not installed, and scripts/setup.sh does not "
            "install it: build docker/Dockerfile on an image that has it (docs/cluster.md)",
            only_here=True,
        )


def _in_hub_cache(repository: str) -> bool:
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")), "hub"
    )
    return Path(cache, f"models--{repository.replace('/', '--')}").is_dir()


def check_data(config: DictConfig) -> Iterator[Problem]:
    """Every training and validation file, and enough problems for a batch."""
    for key, needed in (("train_files", config.data.train_batch_size), ("val_files", 1)):
        if config.data[key] is None:
            yield about(f"data.{key}", " is not set: give a parquet file or a list of them")
            continue
        files = config.data[key]
        files = list(files) if isinstance(files, ListConfig) else [files]
        if not files:
            yield about(f"data.{key}", " is an empty list: give a parquet file or a list of them")
        if wrong := [file for file in files if not isinstance(file, str) or not file]:
            yield about(f"data.{key}", f"={shown(wrong[0])}: give a parquet file or a list of them")
            continue
        rows, long = 0, 0
        for file in files:
            if "://" in str(file):  # a remote file system, which verl reads itself
                rows = 1 << 60
                continue
            problem, count = inspect_data_file(Path(file), config.data.prompt_key)
            rows += count
            if problem:
                absent = not Path(file).exists()
                hint = (_maker(config, file) or "; cppo prepare makes data files") if absent else ""
                yield Problem("data file", f"data.{key}: {file} {problem}{hint}", only_here=absent)
                rows += 1 << 60  # how many there are is another question
            elif count < 1 << 60 and isinstance(needed, int):
                long += _too_long(Path(file), config, needed)
        if rows and isinstance(needed, int) and rows < needed:
            yield about(f"data.{key}", f" holds {rows} problems, fewer than one batch (data.train_batch_size={needed})")
        elif long and isinstance(needed, int) and rows - long < needed:
            yield about(
                f"data.{key}",
                f": {long} of {rows} prompts have more tokens than data.max_prompt_length="
                f"{config.data.max_prompt_length} and are left out, so fewer than {needed} remain; give a longer one",
            )


def _too_long(file: Path, config: DictConfig, enough: int) -> int:
    """Prompts of over data.max_prompt_length tokens, without the chat template; 0 where that cannot be told here.

    Args:
        enough: shorter ones after which the rest is not looked at.
    """
    path = config.actor_rollout_ref.model.path
    tokenizer_file = Path(os.path.expanduser(path)) / "tokenizer.json" if path else None
    if tokenizer_file is None or not tokenizer_file.is_file() or not config.data.filter_overlong_prompts:
        return 0
    if config.data.max_prompt_length < 1:  # has been named
        return 0
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception:  # the library's own kind
        return 0
    key, long, short = config.data.prompt_key, 0, 0
    for batch in _rows_of(file, 1024, [key])[2]:
        for prompt in batch.to_pydict()[key]:
            contents = (message.get("content") for message in prompt or ())
            text = "".join(content for content in contents if isinstance(content, str))
            # One at a time: encode_batch starts threads, of which the library warns when the launcher forks.
            is_long = len(tokenizer.encode(text, add_special_tokens=False).ids) > config.data.max_prompt_length
            long, short = long + is_long, short + (not is_long)
            if short >= enough:
                return long
    return long


def inspect_data_file(path: Path, prompt_key: str) -> tuple[str | None, int]:
    """(what is wrong or None, rows) of one verl data file, every row of it; JSON that is one array is left to verl."""
    if path.is_dir():
        return "is a folder; give the files in it", 0
    if not path.is_file():
        return "does not exist", 0
    if path.suffix not in (".parquet", ".json", ".jsonl"):
        return "is none of .parquet, .json and .jsonl, which verl reads", 0
    import pyarrow

    wanted = [prompt_key, "data_source", "reward_model"]
    try:
        if path.suffix != ".parquet" and _is_an_array(path):
            return None, 1 << 60  # verl's own loader reports what is wrong there
        schema, count, batches = _rows_of(path, 8192, wanted)
        columns = set(schema.names)
        missing = set(wanted) - columns
        if missing:
            return f"lacks the column {', '.join(sorted(missing))} (it has {', '.join(sorted(columns))})", 0
        if "agent_name" in columns:
            return "has a column agent_name, which would replace our agent loop; leave it out", 0
        if not count:
            return "is empty", 0
        return inspect_rows(schema, batches, prompt_key), count
    except (pyarrow.ArrowException, OSError) as error:
        kind = "parquet file" if path.suffix == ".parquet" else "file of JSON lines"
        return f"is not a readable {kind}: {str(error).splitlines()[0]}", 0


def _rows_of(path: Path, size: int, columns: list[str]) -> tuple[Any, int, Iterator[Any]]:
    """(schema, number of rows, record batches of up to ``size`` rows) of a parquet file or one of JSON lines."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        file = parquet.ParquetFile(path)
        return file.schema_arrow, file.metadata.num_rows, file.iter_batches(batch_size=size, columns=columns)
    import pyarrow.json

    table = pyarrow.json.read_json(path)
    return table.schema, table.num_rows, iter(table.to_batches(size))


def _is_an_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4096).lstrip().startswith(b"[")


def check_reward(config: DictConfig) -> Iterator[Problem]:
    """The reward function, without running it, and the overlong buffer."""
    key, path = "reward.custom_reward_function", config.reward.custom_reward_function.path
    if path is None:
        yield about(
            f"{key}.path", " is not set: give a file with a reward function, or leave it at pkg://cppo_verl.grading"
        )
    elif path.startswith("pkg://"):
        module = path.removeprefix("pkg://").replace("/", ".")
        if not _importable(module):
            yield about(f"{key}.path", f"={path}: there is no module {module}")
    elif not Path(path.removeprefix("file://")).is_file():
        yield about(f"{key}.path", f"={path} does not exist")
    else:
        file, name = Path(path.removeprefix("file://")), config.reward.custom_reward_function.name
        yield from _check_python(f"{key}.path", file, name, f"{key}.name", f"={name}: {file} does not define it")
    overlong, longest = config.reward.reward_kwargs.overlong_buffer_cfg, config.data.max_response_length
    if overlong.enable and not 0 < overlong.len <= longest:
        yield about(
            "reward.reward_kwargs.overlong_buffer_cfg.len",
            f"={overlong.len} must be between 1 and data.max_response_length={longest}",
        )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _check_python(key: str, path: Path, name: str, name_key: str, lacking: str) -> Iterator[Problem]:
    """Read, not run: the file may need what only the workers have."""
    try:
        text = path.read_text()
        ast.parse(text, str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        yield about(key, f"={path} is not Python: {error}")
        return
    if not re.search(rf"\b{re.escape(name)}\b", text):
        yield about(name_key, lacking)


def check_tools(config: DictConfig) -> Iterator[Problem]:
    """An agent loop with tools has some, and tools have an agent loop."""
    rollout = config.actor_rollout_ref.rollout
    loop, loop_key = rollout.agent.default_agent_loop, "actor_rollout_ref.rollout.agent.default_agent_loop"
    keys = [f"actor_rollout_ref.rollout.multi_turn.{name}" for name in ("function_tool_path", "tool_config_path")]
    given = {key: Path(path) for key in keys if (path := OmegaConf.select(config, key)) is not None}
    if loop == TOOL_LOOP and not given:
        yield about(keys[0], f" is not set: {loop_key}={loop} needs a file of tools, here or in tool_config_path")
    if loop == AGENT_LOOP and given:
        yield about(loop_key, f"={loop} uses no tools, but {next(iter(given))} is set; give {TOOL_LOOP}")
    for key, path in given.items():
        if not path.is_file():
            yield about(key, f"={path} does not exist")
        elif key == keys[0]:
            yield from _check_python(key, path, "function_tool", key, f"={path} has no function with @function_tool")
