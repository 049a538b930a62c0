"""Shape of a model, from its ``config.json`` or from configs/facts/: parameters and what follows from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cppo_verl.config.compose import config_dir

_KNOWN_TYPES = ("qwen3", "qwen3_moe", "qwen2", "llama")


@dataclass(frozen=True)
class Model:
    """Shape of a decoder with grouped-query attention and gated MLPs, dense or mixture of experts."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP, or of one expert."""
    vocabulary: int
    tied: bool
    """Input embedding and output head share their weights."""
    qk_norm: bool
    bias: bool
    """Of the query, key and value projections."""
    experts: int = 0
    experts_per_token: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Model | None":
        """From a Hugging Face config.json; None where it is not one of those counted exactly, or lacks a size."""
        kind = config.get("model_type")
        experts = config.get("num_experts", 0) if kind == "qwen3_moe" else 0
        mixed = experts and (config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"))
        if kind not in _KNOWN_TYPES or mixed or config.get("attention_bias") or config.get("mlp_bias"):
            return None
        width = "moe_intermediate_size" if experts else "intermediate_size"
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", width)
        if not all(isinstance(config.get(name), int) for name in sizes):
            return None
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config[width],
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            bias=kind == "qwen2",
            experts=experts,
            experts_per_token=config["num_experts_per_tok"] if experts else 1,
        )

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.key_value_heads * self.head_dim

    @property
    def attention(self) -> int:
        """Parameters of one layer's projections."""
        projected = self.query + 2 * self.key_value
        return self.hidden * (projected + self.query) + (projected if self.bias else 0)

    @property
    def replicated(self) -> int:
        """Parameters of one layer that tensor parallelism does not divide: norms and router."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0) + self.experts * self.hidden

    @property
    def mlp(self) -> int:
        """Parameters of one MLP or expert."""
        return 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        return self.attention + self.replicated + self.mlp * max(self.experts, 1)

    @property
    def head(self) -> int:
        """Parameters of the embedding, and of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.head * (1 if self.tied else 2) + self.hidden

    @property
    def active_parameters(self) -> int:
        """That one token passes, embeddings included."""
        idle = max(self.experts - self.experts_per_token, 0)
        return self.parameters - self.layers * self.mlp * idle


def find_model(settings: DictConfig) -> tuple[Model | None, str]:
    """(shape, where from) of a model folder, the local hub cache or configs/facts/; (None, why not)."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = settings.path
    if settings.lora_rank or settings.lora.get("rank"):
        return None, "LoRA trains other weights than the model's"
    owner, _, name = path.rpartition("/")
    facts = config_dir() / "facts" / f"{name.removesuffix('-Base')}.json"
    try:
        cached = None if Path(path).is_dir() else try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # a folder that is not on this machine
        cached = None
    for file in (Path(path) / "config.json", cached, facts if owner == "Qwen" else None):
        if isinstance(file, (str, Path)) and Path(file).is_file():
            shape = json.loads(Path(file).read_text())
            model = Model.from_config(shape)
            if model is None:
                return None, f"{path} (model_type {shape.get('model_type')}) is not one that is counted exactly"
            return (
                model,
                f"{model.parameters:,} parameters by {'configs/facts/' + facts.name if file == facts else file}",
            )
    return None, f"no config.json of {path} here (a model folder, the local hub cache, configs/facts/)"
