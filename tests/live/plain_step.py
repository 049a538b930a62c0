"""``python plain_step.py DUMP OUT OVERRIDES...``: the update of a dumped step again, by the toy table's training.

DUMP is the folder of a live run's first step; OUT becomes a run folder with the same step's dump.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "toy_table"))


def responses_of(dump):
    """Every response of the step in the order of its minibatches, and the verdicts."""
    from sampling import Response

    responses, right = [], []
    for file in sorted(dump.glob("minibatch*.pt")):
        batch = torch.load(file)
        for row, valid in enumerate(batch["response_mask"]):
            written = batch["responses"][row].nonzero()  # padded with id 0
            # Of a skipped group's response the length is not known, and does not matter.
            length = int(valid.sum()) or 1 + int(written[-1])
            prompt = batch["prompts"][row]
            columns = ("rollout_log_prob", "topk_ids", "rollout_topk_log_prob")
            responses.append(
                Response(
                    prompt[prompt != 0],
                    batch["responses"][row, :length],
                    *(batch[name][row, :length] for name in columns),
                )
            )
            right.append(float(batch["acc"][row]))
    return responses, np.array(right)


def main(dump, out, overrides):
    from cell import Training, batch_of

    from cppo_verl.adapters.actor.alone import join_process_group
    from cppo_verl.config.compose import compose

    join_process_group()
    config = compose(overrides)
    responses, right = responses_of(dump)
    training = Training(config, out)
    training.steps = 1
    training.update(batch_of(responses, right, config), ["?"] * len(responses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
