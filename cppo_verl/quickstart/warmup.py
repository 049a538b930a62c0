"""The supervised warm start: a fixed number of steps on a mixture of worked and sloppy answers."""

import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cppo_verl.grading.extract import final_answer
from cppo_verl.quickstart.calculator import MAX_CALLS, called_with, calling_answer, evaluate, result_turn
from cppo_verl.quickstart.specs import Supervised
from cppo_verl.quickstart.task import Problem, SignedSum, TaskSpec, is_correct, sloppy_answer, worked_answer

IGNORED_LABEL = -100
ACCURACY_RANGE = (0.20, 0.40)
MIN_BOXED_SHARE = 0.95
REPORTS = 10

# An answer to a problem in a style that the random numbers choose: turns of the model and of a tool alternate.
ProblemT = TypeVar("ProblemT", bound=Problem)
Answering = Callable[[ProblemT, random.Random], Sequence[str]]


@dataclass(frozen=True)
class SampledAccuracy:
    """Shares of sampled answers that are right and that hold a box, and their mean length in tokens."""

    accuracy: float
    boxed_share: float
    mean_tokens: float


def encode_prompt(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> list[int]:
    """Token ids of the chat prompt, up to where the assistant begins to write."""
    ids = tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return cast(list[int], ids)


# Token ids of a conversation, and which of them are to be learned.
Example = tuple[list[int], list[bool]]


def encode_example(tokenizer: PreTrainedTokenizerFast, problem: Problem, turns: Sequence[str]) -> Example:
    """The prompt and the turns after it; the model's own, every second one, end with its end-of-turn token."""
    ids = encode_prompt(tokenizer, problem)
    learned = [False] * len(ids)
    for number, turn in enumerate(turns):
        own = number % 2 == 0
        tokens = tokenizer.encode(turn, add_special_tokens=False) + [tokenizer.eos_token_id] * own
        ids, learned = ids + tokens, learned + [own] * len(tokens)
    return ids, learned


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-pad to int64 [batch, width] tensors; only what is to be learned carries labels.

    No attention mask is needed: under causal attention nothing on the right reaches a labelled position.
    """
    width = max(len(tokens) for tokens, _ in examples)
    ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORED_LABEL)
    for row, (tokens, learned) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.tensor(tokens).where(torch.tensor(learned), IGNORED_LABEL)
    return {"input_ids": ids, "labels": labels}


def learning_rate_scale(step: int, steps: int) -> float:
    """Linear rise over the first twentieth of the run, then a half cosine down to zero."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def answering(task: TaskSpec, worked_share: float) -> Answering[SignedSum]:
    """The toy task's answers: worked, or with a calculator, in the given share of all cases, otherwise sloppy."""

    def answer(problem: SignedSum, rng: random.Random) -> Sequence[str]:
        if rng.random() < worked_share:
            return calling_answer(problem) if task.calculator else [worked_answer(problem)]
        return [sloppy_answer(problem, task, rng)]

    return answer


def run_warmup(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[ProblemT],
    answer: Answering[ProblemT],
    spec: Supervised,
    seed: int,
) -> None:
    """Train ``model`` in place on freshly drawn answers to ``problems``, the same way for the same seed."""
    rng = random.Random(f"warmup-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, spec.steps))
    started = time.monotonic()
    model.train()
    for step in range(1, spec.steps + 1):
        drawn = rng.choices(problems, k=spec.batch_size)
        examples = [encode_example(tokenizer, problem, answer(problem, rng)) for problem in drawn]
        loss = model(**collate(examples, tokenizer.pad_token_id)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % max(1, spec.steps // REPORTS) == 0 or step == spec.steps:
            seconds = time.monotonic() - started
            print(f"warm-up step {step}/{spec.steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    max_new_tokens: int,
) -> tuple[list[str], float]:
    """One answer per problem at temperature 1 with no truncation, and their mean length in tokens.

    A turn that ends in a call of the calculator is followed by its result and another turn; the text is the last one's.
    """
    sampling: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": max_new_tokens,
    }
    contexts = [encode_prompt(tokenizer, problem) for problem in problems]
    texts, own, unfinished = [""] * len(problems), 0, list(range(len(problems)))
    for _ in range(1 + MAX_CALLS):
        batch = tokenizer.pad([{"input_ids": contexts[row]} for row in unfinished], return_tensors="pt")
        output = model.generate(**batch, **sampling)  # type: ignore[misc]  # transformers mistypes `self`
        answers = output[:, batch["input_ids"].shape[1] :]
        own += int((answers != tokenizer.pad_token_id).sum())
        calling = []
        for row, answer in zip(unfinished, answers, strict=True):
            texts[row] = tokenizer.decode(answer, skip_special_tokens=True)
            if (expression := called_with(texts[row])) is not None:
                contexts[row] += [int(token) for token in answer if token != tokenizer.pad_token_id]
                contexts[row] += tokenizer.encode(result_turn(_result(expression)), add_special_tokens=False)
                calling.append(row)
        if not calling:
            break
        unfinished = calling
    return texts, own / len(problems)


def _result(expression: str) -> str:
    try:
        return str(evaluate(expression))
    except ValueError as error:
        return str(error)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> SampledAccuracy:
    """Sample every problem ``samples`` times at temperature 1."""
    torch.manual_seed(seed)
    model.eval()
    repeated = [problem for problem in problems for _ in range(samples)]
    texts, mean_tokens = sample_texts(model, tokenizer, repeated, max_new_tokens)
    right = sum(is_correct(text, problem.answer) for text, problem in zip(texts, repeated, strict=True))
    boxed = sum(final_answer(text) is not None for text in texts)
    return SampledAccuracy(right / len(texts), boxed / len(texts), mean_tokens)


def warn_off_target(result: SampledAccuracy, accuracy_range: tuple[float, float], min_boxed_share: float) -> None:
    """Tell of a warm start from which training would learn little."""
    low, high = accuracy_range
    if not low <= result.accuracy <= high or result.boxed_share < min_boxed_share:
        print(
            f"warning: the warm start is right {result.accuracy:.1%} of the time (wanted {low:.0%} to {high:.0%}) "
            f"and boxes {result.boxed_share:.1%} of its answers (wanted {min_boxed_share:.0%})",
            file=sys.stderr,
        )
