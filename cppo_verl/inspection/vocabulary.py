"""Token ids to text that is only text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cppo_verl.run.terminal import plain


def texts(config: DictConfig, ids: Iterable[int]) -> tuple[dict[str, str], bool]:
    """Id (as a key of JSON) -> text, and whether the model's tokenizer was found on this machine.

    Control and bidi characters stand as Python writes them; without a tokenizer a token is its number.
    """
    tokenizer = _tokenizer(str(config.actor_rollout_ref.model.get("path") or ""))
    if tokenizer is None:
        return {str(number): f"#{number} " for number in ids}, False
    return {str(number): _text(tokenizer, number) for number in ids}, True


def _text(tokenizer: Any, number: int) -> str:
    piece = tokenizer.id_to_token(number)
    if piece is None:
        return f"#{number} "
    text = tokenizer.decode([number], skip_special_tokens=False)
    # SentencePiece's decoders drop the space of a first word.
    space = " " if piece.startswith("▁") and not text.startswith(" ") else ""
    return space + plain(text) or f"#{number} "


def _tokenizer(path: str) -> Any | None:
    """Of a local folder, or of a hub id in the cache: nothing is fetched, and no code of the model's is run."""
    if not path:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from tokenizers import Tokenizer

    file: object = Path(path).expanduser() / "tokenizer.json"
    if not Path(path).expanduser().is_dir():
        try:
            file = try_to_load_from_cache(path, "tokenizer.json")
        except HFValidationError:
            return None
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception:  # the library's own kind
        return None
