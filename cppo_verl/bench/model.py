"""Models with random weights: the quickstart's network with any vocabulary, and the shapes in configs/facts/.

``python -m cppo_verl.bench.model SHAPE FOLDER`` makes one of the latter, on a GPU where there is one.
"""

import json
import subprocess
import sys
from pathlib import Path

from cppo_verl.config.compose import config_dir

# Of the logits over the vocabulary. Fresh weights give about 0.9 and nearly the flat distribution; at 4 a token has
# some four nats of entropy, as one of a language model has.
_LOGIT_STD = 4.0


def tiny_model(vocabulary: int) -> Path:
    """Folder of a model with ``vocabulary`` tokens, made once under runs/."""
    from cppo_verl.quickstart.model import build_model, build_tokenizer
    from cppo_verl.quickstart.specs import ModelShape

    folder = Path(f"runs/bench-model-{vocabulary}").absolute()
    shape = ModelShape(vocabulary=vocabulary)
    if not (folder / "tokenizer_config.json").exists():  # written last: an interrupted build is made again
        tokenizer = build_tokenizer(shape)
        build_model(shape, tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def shapes() -> list[str]:
    """Names that :func:`random_model` knows."""
    return sorted(file.stem for file in (config_dir() / "facts").glob("*.json"))


def random_model(shape: str) -> Path:
    """Folder of a bfloat16 model of that shape, made once under runs/ by a process that gives the GPU back."""
    folder = Path(f"runs/bench-model-{shape}").absolute()
    if not (folder / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, "-m", __name__, shape, str(folder)], check=True)
    return folder


def _make(shape: str, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from cppo_verl.quickstart.model import build_tokenizer
    from cppo_verl.quickstart.specs import ModelShape

    facts = json.loads((config_dir() / "facts" / f"{shape}.json").read_text())
    tokenizer = build_tokenizer(ModelShape(vocabulary=facts["vocab_size"], max_positions=32_768))
    ids = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    config = AutoConfig.for_model(**facts, **ids, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings().weight.detach()
    with torch.no_grad():  # normalised states of unit entries: logits of |row| each
        model.model.norm.weight.fill_(_LOGIT_STD / head[:1000].float().norm(dim=-1).mean())
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _make(sys.argv[1], Path(sys.argv[2]))
