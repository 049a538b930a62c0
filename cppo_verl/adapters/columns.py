"""Names of what is ours in a request, in a trajectory and in a batch, from vLLM through TransferQueue to the loss.

The Top-K columns have the same names in the server's output, in the queue, in the actor's ``TopK``, in ``core`` and in
a dumped step.
"""

# verl's names of our agent loops: one turn, and several with tools.
AGENT_LOOP = "cppo_single_turn"
TOOL_LOOP = "cppo_tool_agent"

# In a training batch for the agent loop, and in a request's SamplingParams.extra_args: K, the tokens wanted a position.
TOPK = "cppo_topk"

# Columns of a trajectory, one row for each token of its response.
TOPK_IDS = "topk_ids"
"""The K ids most likely under mu, int32 ``[T, K]``."""
ROLLOUT_TOPK_LOG_PROB = "rollout_topk_log_prob"
"""log mu at them, ``[T, K]``; float32, or on its way float16 (``divergence.log_prob_dtype``)."""
TOPK_COLUMNS = (TOPK_IDS, ROLLOUT_TOPK_LOG_PROB)

# A column of a trajectory in the asynchronous modes.
ROLLOUT_VERSION = "rollout_version"
"""The version of the weights that sampled each token, int32 ``[T]``: the last training step in them, 0 for none."""

# In a training batch: the version of the weights that the step began with, to which tokens have an age.
POLICY_VERSION = "policy_version"

# In a trajectory's extra_fields: the response ended at its longest length. verl's own stop reason does not tell.
TRUNCATED = "truncated"

# In a trajectory's extra_fields, where there are tools: how often the model called one, and how often that failed.
TOOL_CALLS = "tool_calls"
TOOL_ERRORS = "tool_errors"

# A column of a training batch: one seed a response, int64 [B].
RESPONSE_SEEDS = "response_seeds"

# Columns of a dumped batch, one value a response, [B].
VERDICT = "verdict"
"""The reward's ``acc``, float32; called acc in the dump."""
INSPECTED = "inspected"
"""Whether a small dump keeps the response, int8 (``run.inspect_every``); without the column all are kept."""

# In a training batch: the folder that its micro-batches are dumped to, "" for none.
DUMP_DIR = "dump_dir"

# In a training batch: rows without a token in the loss are passed through the model as well.
TRAIN_ALL_ROWS = "train_all_rows"

# In a training batch: it belongs to a step that has been updated by others already, and its metrics go on.
CONTINUES = "continues"
