"""Micro-batches with Top-K fields, built from known full distributions."""

import torch
from tensordict import TensorDict

VOCABULARY, K = 64, 20


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(lengths, *, k=K, dtype=torch.float32, seed=0, scale=2.0, vocabulary=VOCABULARY):
    """(data, logits of pi, padded log pi, padded log mu, valid); prompts have 3 + row tokens."""
    generator = torch.Generator().manual_seed(seed)
    columns = {name: [] for name in ("prompts", "responses", "input_ids", "topk_ids", "rollout_topk_log_prob")}
    logits, log_mu = [], []
    for row, length in enumerate(lengths):
        prompt = torch.randint(vocabulary, (3 + row,), generator=generator)
        own = scale * torch.randn(3 + row + length, vocabulary, generator=generator)
        mu = (own + 0.5 * torch.randn(own.shape, generator=generator)).log_softmax(-1)[2 + row : -1]
        response = torch.multinomial(mu.exp(), 1, generator=generator)[:, 0] if length else torch.empty(0).long()
        top = mu.topk(k, dim=-1)
        columns["prompts"].append(prompt)
        columns["responses"].append(response)
        columns["input_ids"].append(torch.cat([prompt, response]))
        columns["topk_ids"].append(top.indices.int())
        columns["rollout_topk_log_prob"].append(top.values.to(dtype))
        logits.append(own)
        log_mu.append(mu.gather(-1, response[:, None])[:, 0])
    data = TensorDict({name: nested(rows) for name, rows in columns.items()}, batch_size=len(lengths))
    log_pi = []
    for row, own in enumerate(logits):
        rows = own[2 + row : -1].double().log_softmax(-1)
        log_pi.append(rows.gather(-1, columns["responses"][row][:, None])[:, 0].float())
    pad = torch.nn.utils.rnn.pad_sequence
    valid = pad([torch.ones(length, dtype=torch.bool) for length in lengths], batch_first=True)
    return data, torch.cat(logits), pad(log_pi, batch_first=True), pad(log_mu, batch_first=True), valid


def expected_log_probs(data, logits):
    """float64 log pi at every response token's K ids, one list of rows per response, by plain loops."""
    result, start = [], 0
    for row in range(len(data)):
        prompt, length = len(data["prompts"][row]), len(data["responses"][row])
        own = logits[start : start + prompt + length].double().log_softmax(-1)
        ids = data["topk_ids"][row]
        result.append([[own[prompt - 1 + t, i].item() for i in ids[t].tolist()] for t in range(length)])
        start += prompt + length
    return result
