"""What ``cppo bench`` trains a step of."""

VARIANTS = {
    "ours": "the configured method through our worker and trainer",
    "binary": "the same over divergence=binary_tv: sampled-only log-probabilities from vLLM, no logits hook",
    "stock": "verl's own ppo_loss, worker and trainer code, bypass_mode on: the same number of forward passes",
    "stock-bypass-off": "the same with the old policy recomputed: one forward pass more",
}
OURS, *OTHERS = VARIANTS
