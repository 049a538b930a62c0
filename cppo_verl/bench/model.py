"""The quickstart's network with random weights and any vocabulary."""

from pathlib import Path


def tiny_model(vocabulary: int) -> Path:
    """Folder of a model with ``vocabulary`` tokens, made once under runs/."""
    from cppo_verl.quickstart.model import ModelShape, build_model, build_tokenizer

    folder = Path(f"runs/bench-model-{vocabulary}").absolute()
    shape = ModelShape(vocabulary=vocabulary)
    if not (folder / "tokenizer_config.json").exists():  # written last: an interrupted build is made again
        tokenizer = build_tokenizer(shape)
        build_model(shape, tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def embedding_megabytes(vocabulary: int) -> int:
    """MiB that its largest tensor fits in."""
    from cppo_verl.quickstart.model import ModelShape

    return 4 * vocabulary * ModelShape().hidden_size // 2**20 + 1
