"""Generation without vLLM: responses with the log-probabilities that a rollout server would give."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Response:
    """One response of T tokens, its end-of-turn token among them; K rows of the most likely tokens."""

    prompt: Tensor
    """int64 ``[P]``."""
    ids: Tensor
    """int64 ``[T]``."""
    rollout_log_prob: Tensor
    """log mu of the sampled tokens, float32 ``[T]``."""
    topk_ids: Tensor
    """int32 ``[T, K]``."""
    rollout_topk_log_prob: Tensor
    """float32 ``[T, K]``."""


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    k: int,
    seed: int,
) -> list[Response]:
    """One response a prompt at temperature 1 from the whole vocabulary, all as one batch."""
    torch.manual_seed(seed)
    batch = tokenizer.pad([{"input_ids": list(prompt)} for prompt in prompts], return_tensors="pt")
    output = model.generate(  # type: ignore[misc]  # transformers mistypes `self`
        **batch,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = output.sequences[:, batch["input_ids"].shape[1] :]
    log_probs = torch.stack(output.logits, dim=1).float().log_softmax(-1)
    sampled = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    top = log_probs.topk(k, dim=-1) if k else None
    ends = ids == tokenizer.eos_token_id
    lengths = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, ids.shape[1])
    none = log_probs.new_zeros(*ids.shape, 0)
    top_ids, top_values = (none.int(), none) if top is None else (top.indices.int(), top.values)
    return [
        Response(torch.tensor(prompt), ids[row, :end], sampled[row, :end], top_ids[row, :end], top_values[row, :end])
        for row, (prompt, end) in enumerate(zip(prompts, lengths.tolist(), strict=True))
    ]
