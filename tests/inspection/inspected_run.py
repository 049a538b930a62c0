"""A run folder with dumped steps, made by the methods themselves on random tensors in place of a training."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models

from cppo_verl import core
from cppo_verl.methods import Tokens

THRESHOLDS = {"tv": {"delta": 0.15, "delta_b": 0.015, "dppo_delta": 0.15}, "delta_b_quantile": None}
CPPO = {"_target_": "cppo_verl.methods.Cppo", "name": "cppo", "ratio_cap": 20.0, "delta": 0.15, "w_min": 0.8,
        "weights": "linear", "horizon": None, "delta_b": 0.015, "delta_b_quantile": None,
        "delta_b_max_factor": 2.0, "soft_gate": False, "importance": "token", "delta_b_scale": 1.0,
        "length_reference": None}  # fmt: skip
WORDS = [f" word{number}" for number in range(300)]
GROUP, K = 8, 20


def make_run(folder, rows=16, length=40, steps=(1,), words=WORDS, method=CPPO, moved=0.3):
    """Dumps of ``rows`` responses of up to ``length`` tokens in groups of eight, two micro-batches a step."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, words[0]))
    backend.decoder = decoders.Fuse()
    (folder / "model").mkdir(exist_ok=True)
    backend.save(str(folder / "model/tokenizer.json"))
    divergence = {"name": "topk_tv", "kind": "tv", "k": K, "thresholds": THRESHOLDS["tv"]}
    config = {
        **{"method": method, "divergence": divergence, "thresholds": THRESHOLDS, "run": {"name": folder.name}},
        **{"actor_rollout_ref": {"model": {"path": str(folder / "model")}}, "data": {}, "trainer": {}},
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    for step in steps:
        (folder / f"dumps/step_{step}").mkdir(parents=True, exist_ok=True)
        for micro, part in enumerate(torch.arange(rows).split(max(rows // 2, GROUP))):
            content = _dump(1000 * step + micro, len(part), length, len(words), method, moved)
            torch.save(content, folder / f"dumps/step_{step}/minibatch{micro}_rank0_micro0.pt")
    return Path(folder)


def _dump(seed, rows, length, vocabulary, method, moved):
    draw = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn((rows, length, K), generator=draw)
    shift = moved * torch.rand((rows, 1, 1), generator=draw) * torch.randn((rows, length, K), generator=draw)
    log_mu, log_pi = logits.log_softmax(-1) - 0.01, (logits + shift).log_softmax(-1) - 0.01
    order = log_mu.argsort(-1, descending=True)
    log_mu, log_pi = log_mu.gather(-1, order), log_pi.gather(-1, order)
    sampled = torch.multinomial(log_mu.exp().flatten(0, 1), 1, generator=draw).view(rows, length, 1)
    ids = (torch.randint(0, vocabulary, (rows, length, 1), generator=draw) + torch.arange(K)) % vocabulary
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=draw)
    lengths[0] = length
    valid = torch.arange(length) < lengths[:, None]
    valid[1::4, 3:6] = False  # of a tool
    advantages = torch.randn((rows, 1), generator=draw).expand(rows, length).contiguous()
    log_prob, rollout = log_pi.gather(-1, sampled)[..., 0], log_mu.gather(-1, sampled)[..., 0]
    inside = torch.ones_like(valid)
    d = core.topk_tv(log_prob, rollout, log_pi, log_mu, inside)
    tokens = Tokens(log_prob, rollout, advantages, valid, d, torch.arange(rows) + seed)
    fields = tokens._asdict() | instantiate(method)(tokens)._asdict()
    fields["response_mask"] = fields.pop("valid")
    prompts = torch.randint(1, vocabulary, (-(-rows // GROUP), 6), generator=draw)
    prompts[:, 4:] *= torch.randint(0, 2, (len(prompts), 1), generator=draw)  # padding
    fields |= {
        **{"topk_ids": ids.int(), "topk_log_prob": log_pi, "rollout_topk_log_prob": log_mu},
        **{"responses": ids.gather(-1, sampled)[..., 0], "prompts": prompts.repeat_interleave(GROUP, 0)[:rows]},
    }
    return {name: value for name, value in fields.items() if value is not None}
