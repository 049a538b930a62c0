"""One cell: a training whose rollouts were sampled by the weights of some steps ago."""

import json
import random
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from sampling import Response, sample
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.utils import tensordict_utils as tu

from cppo_verl.adapters.actor.alone import actor_of
from cppo_verl.adapters.actor.worker import TrustRegionTrainingWorker
from cppo_verl.adapters.columns import (
    DUMP_DIR,
    POLICY_VERSION,
    RESPONSE_SEEDS,
    ROLLOUT_VERSION,
    TRAIN_ALL_ROWS,
    VERDICT,
)
from cppo_verl.adapters.driver.step_metrics import require_finite_gradient
from cppo_verl.adapters.rollout.seeding import response_seed
from cppo_verl.config.compose import compose
from cppo_verl.quickstart.task import DATA_SOURCE, SignedSum, TaskSpec, is_correct, make_splits
from cppo_verl.quickstart.warmup import encode_prompt
from cppo_verl.run.files import write_atomically, write_lines
from cppo_verl.run.folder import CONFIG, MANIFEST
from cppo_verl.run.log import RunLog


class Training:
    """A policy, the versions of its weights, and the problems that it is trained on.

    Args:
        config: composed as for ``cppo train``; ``run.staleness`` steps lie between the weights that generate and
            those that are trained.
        run: the run folder, where the steps that ``run.dump_steps`` names are dumped.
    """

    def __init__(self, config: DictConfig, run: Path) -> None:
        self.config, self.run = config, run
        folder = config.actor_rollout_ref.model.path
        self.actor: TrustRegionTrainingWorker = actor_of(config)
        self.sampler: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
        splits = make_splits(TaskSpec(), config.run.seed)
        self.heldout = splits.heldout
        self._problems = _in_turn(splits.train, random.Random(f"prompts-{config.run.seed}"))
        # (the last step in them, weights), the newest last
        self._versions = deque([(0, self._weights())], maxlen=config.run.staleness + 1)
        self._needs_seeds = instantiate(config.method).needs_response_seeds
        self.steps = 0

    def step(self) -> dict[str, float]:
        """Generate, grade, train; returns the step's numbers."""
        begun = time.monotonic()
        rollout, data = self.config.actor_rollout_ref.rollout, self.config.data
        self.steps += 1
        problems = [next(self._problems) for _ in range(data.train_batch_size)]
        repeated = [problem for problem in problems for _ in range(rollout.n)]
        version, weights = self._versions[0]
        responses = self._sample(weights, repeated, self.steps)
        right = self._graded(responses, repeated)
        batch = batch_of(responses, right, self.config)
        if self.config.run.staleness:
            versions = [torch.full((len(response.ids),), version, dtype=torch.int32) for response in responses]
            batch[ROLLOUT_VERSION] = torch.nested.as_nested_tensor(versions, layout=torch.jagged)
        metrics = self.update(batch, [problem.question for problem in repeated])
        self._versions.append((self.steps, self._weights()))
        found = {
            "critic/score/mean": float(right.mean()),
            "response_length/mean": float(np.mean([len(response.ids) for response in responses])),
            "timing_s/step": time.monotonic() - begun,
            **{name if "/" in name else f"actor/{name}": value for name, value in metrics.items()},
        }
        require_finite_gradient(found, self.steps)
        return found

    def update(self, batch: TensorDict, questions: Sequence[str]) -> dict[str, float]:
        """The minibatches of one step, in order; ``questions`` name the problem of each row."""
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        size = actor.ppo_mini_batch_size * rollout.n
        dump, folder = self.steps in self.config.run.dump_steps, f"{self.run}/dumps/step_{self.steps}"
        if self._needs_seeds:
            numbers = [row % rollout.n for row in range(len(batch))]
            seeds = [
                response_seed(self.config.run.seed, self.steps, question, number)
                for question, number in zip(questions, numbers, strict=True)
            ]
            batch[RESPONSE_SEEDS] = torch.tensor(seeds).unsqueeze(-1)
        tu.assign_non_tensor(
            batch,
            temperature=rollout.temperature,
            calculate_entropy=actor.calculate_entropy,
            global_batch_size=size,
            mini_batch_size=size,
            epochs=actor.ppo_epochs,
            seed=actor.data_loader_seed,
            dataloader_kwargs={"shuffle": actor.shuffle},
            **{POLICY_VERSION: self.steps - 1, TRAIN_ALL_ROWS: dump, DUMP_DIR: folder if dump else ""},
        )
        output = self.actor.train_mini_batch(batch)
        return {name: float(np.mean(value)) for name, value in tu.get(output, "metrics").items()}

    def evaluate(self) -> list[dict[str, Any]]:
        """``val_kwargs.n`` answers of the newest weights to each held-out problem, as a run keeps its validations."""
        samples = self.config.actor_rollout_ref.rollout.val_kwargs.n
        repeated = [problem for problem in self.heldout for _ in range(samples)]
        responses = self._sample(self._versions[-1][1], repeated, -self.steps)
        return [
            {"input": problem.question, "gts": str(problem.answer), "acc": verdict, "data_source": DATA_SOURCE}
            for problem, verdict in zip(repeated, self._graded(responses, repeated).tolist(), strict=True)
        ]

    def _sample(self, weights: dict[str, Tensor], problems: Sequence[SignedSum], number: int) -> list[Response]:
        self.sampler.load_state_dict(weights)
        prompts = [encode_prompt(self.tokenizer, problem) for problem in problems]
        length, k = self.config.data.max_response_length, self.config.divergence.k or 0
        seed = response_seed(self.config.run.seed, number, "batch", 0)
        return sample(self.sampler, self.tokenizer, prompts, length, k, seed)

    def _graded(self, responses: Sequence[Response], problems: Sequence[SignedSum]) -> np.ndarray:
        texts = self.tokenizer.batch_decode([response.ids for response in responses], skip_special_tokens=True)
        return np.array([is_correct(text, p.answer) for text, p in zip(texts, problems, strict=True)], dtype=float)

    def _weights(self) -> dict[str, Tensor]:
        parameters, _ = self.actor.engine.get_per_tensor_param()
        weights = {name: value.detach().clone() for name, value in parameters}
        if self.sampler.config.tie_word_embeddings:
            weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        return weights


def batch_of(responses: Sequence[Response], right: np.ndarray, config: DictConfig) -> TensorDict:
    """The columns that the actor reads of graded responses, groups of ``rollout.n`` in order."""
    group = np.arange(len(responses)) // config.actor_rollout_ref.rollout.n
    varied = {number for number in set(group) if len(set(right[group == number])) > 1}
    used = [not config.run.mask_std_0 or number in varied for number in group]
    advantages, _ = compute_grpo_outcome_advantage(
        torch.tensor(right, dtype=torch.float32).unsqueeze(-1),
        torch.ones(len(responses), 1),
        group,
        norm_adv_by_std_in_grpo=config.algorithm.norm_adv_by_std_in_grpo,
    )
    columns: dict[str, Callable[[Response], Tensor]] = {
        "prompts": lambda response: response.prompt,
        "responses": lambda response: response.ids,
        "input_ids": lambda response: torch.cat([response.prompt, response.ids]),
        "position_ids": lambda response: torch.arange(len(response.prompt) + len(response.ids)),
        "response_mask": lambda response: torch.ones(len(response.ids), dtype=torch.int64),
        "rollout_log_probs": lambda response: response.rollout_log_prob,
    }
    if config.divergence.k:
        columns["topk_ids"] = lambda response: response.topk_ids
        columns["rollout_topk_log_prob"] = lambda response: response.rollout_topk_log_prob
    rows = {name: [column(response) for response in responses] for name, column in columns.items()}
    lengths = [len(response.ids) for response in responses]
    rows["loss_mask"] = [torch.full((n,), int(use), dtype=torch.int64) for n, use in zip(lengths, used, strict=True)]
    rows["advantages"] = [value.expand(n).clone() for n, value in zip(lengths, advantages[:, 0], strict=True)]
    nested = {name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in rows.items()}
    nested[VERDICT] = torch.tensor(right, dtype=torch.float32).unsqueeze(-1)
    return TensorDict(nested, batch_size=len(responses))


def _in_turn(problems: Sequence[SignedSum], draw: random.Random) -> Iterator[SignedSum]:
    """All problems in a random order, and again in another."""
    while True:
        yield from draw.sample(problems, len(problems))


def train(overrides: Sequence[str], folder: Path, made: dict[str, Any]) -> float:
    """Make ``folder`` a run folder of these overrides of ``cppo train``, all at once; returns the last accuracy.

    Held-out problems are answered before the first step, every ``trainer.test_freq`` steps and after the last.

    Args:
        made: what the run's manifest is to say.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    config = compose(overrides)
    folder.parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_atomically(temporary / CONFIG, OmegaConf.to_yaml(config, resolve=True))
        training, log = Training(config, temporary), RunLog(temporary)
        (temporary / "validation").mkdir()
        total, every = config.trainer.total_training_steps, config.trainer.test_freq
        accuracy = _validate(training, log)
        for number in range(1, total + 1):
            log.metrics(number, training.step())
            if number % every == 0 or number == total:
                accuracy = _validate(training, log)
        attempt = {"attempt": 1, "tracking_id": uuid.uuid4().hex[:12], **made}
        write_atomically(temporary / MANIFEST, json.dumps({"attempts": [attempt]}, indent=2) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return accuracy


def _validate(training: Training, log: RunLog) -> float:
    rows, step = training.evaluate(), training.steps
    write_lines(log.folder / "validation" / f"{step}.jsonl", rows)
    accuracy = float(np.mean([row["acc"] for row in rows]))
    samples = len(rows) // len(training.heldout)
    log.metrics(step, {f"val-core/{DATA_SOURCE}/acc/mean@{samples}": accuracy})
    return accuracy
