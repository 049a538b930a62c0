"""The arm "trl": TRL's GRPOTrainer with transformers' generation, in TRL's own environment.

``python trl_grpo.py SETTINGS``: JSON, made by ``trl_settings`` in arms.py. Appends lines to OUTPUT_DIR/events.jsonl,
times in seconds since 1970. Of this project only the grader is used (cppo_verl on PYTHONPATH).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from cppo_verl.grading import compute_score


def problems(file: str) -> list[dict[str, Any]]:
    """A verl data file as TRL's columns."""
    rows = pd.read_parquet(file).to_dict("records")
    return [{"prompt": list(row["prompt"]), "ground_truth": row["reward_model"]["ground_truth"]} for row in rows]


def right(completions: list[list[dict[str, str]]], ground_truth: list[str], **_: Any) -> list[float]:
    """TRL's signature of a reward function over our grader."""
    pairs = zip(completions, ground_truth, strict=True)
    return [compute_score("arithmetic", messages[0]["content"], gold)["score"] for messages, gold in pairs]


class Record(TrainerCallback):  # type: ignore[misc]
    """Writes a line for each step (one generation batch, ``updates`` optimizer updates) and for each evaluation."""

    def __init__(self, settings: dict[str, Any], heldout: list[dict[str, Any]]) -> None:
        self.settings, self.heldout = settings, heldout
        self.file = Path(settings["config"]["output_dir"]) / "events.jsonl"
        self.mark = 0.0
        self.rollout_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluate(0, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "reward" not in logs:  # the summary after the last step
            return
        step, now = state.global_step // self.settings["updates"], time.time()
        self._write(
            event="step",
            step=step,
            at=now,
            seconds=now - self.mark,
            tokens=round(logs["completions/mean_length"] * args.generation_batch_size),
            rollout_seconds=self.rollout_seconds,
            reward=logs["reward"],
        )
        self.mark, self.rollout_seconds = now, 0.0
        if step % self.settings["evaluate_every"] == 0 or state.global_step == state.max_steps:
            self._evaluate(step, **kwargs)

    def _evaluate(self, step: int, **kwargs: Any) -> None:
        begun = time.time()
        accuracy = evaluate(kwargs["model"], kwargs["processing_class"], self.heldout, self.settings)
        self.mark = time.time()
        self._write(event="evaluation", step=step, at=self.mark, seconds=self.mark - begun, accuracy=accuracy)

    def _write(self, **record: Any) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(record) + "\n")


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, heldout: list[dict[str, Any]], settings: dict[str, Any]) -> float:
    """Accuracy over ``samples`` answers to each problem at temperature 1, all of them in one batch."""
    repeated = [problem for problem in heldout for _ in range(settings["samples"])]
    batch = tokenizer.apply_chat_template(
        [problem["prompt"] for problem in repeated],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    longest = settings["config"]["max_completion_length"]
    model.eval()
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=longest,
    )
    model.train()
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = right([[{"content": text}] for text in texts], [problem["ground_truth"] for problem in repeated])
    return sum(scores) / len(scores)


def main() -> None:
    settings = json.loads(sys.argv[1])
    record = Record(settings, problems(settings["heldout"]))
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=right,
        args=GRPOConfig(**settings["config"]),
        train_dataset=Dataset.from_list(problems(settings["train"])),
        callbacks=[record],
    )
    generate = trainer._generate_single_turn

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.time()
        try:
            return generate(*args, **kwargs)
        finally:
            record.rollout_seconds += time.time() - started

    trainer._generate_single_turn = timed
    trainer.train()


if __name__ == "__main__":
    main()
