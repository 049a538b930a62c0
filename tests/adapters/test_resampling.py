"""The statistics of a validation are verl's to the bit, and quick."""

import time
from functools import partial

import numpy as np
import pytest
from verl.trainer.ppo import metric_utils
from verl.trainer.ppo.metric_utils import calc_maj_val, process_validation_metrics

from cppo_verl.adapters.driver import resampling

VERLS = resampling._verls_bootstrap_metric


def validation(problems, samples, variables=("acc", "score", "tokens"), seed=0):
    """The arguments of verl's function: rewards of 0 and 1, real ones, ints; a problem with fewer samples."""
    rng = np.random.default_rng(seed)
    uids = [f"p{problem}" for problem in range(problems) for _ in range(samples - (problem == 1))]
    sources = ["a" if int(uid[1:]) % 3 else "b" for uid in uids]
    makers = (
        lambda: float(rng.random() < 0.4),
        lambda: float(rng.standard_normal()),
        lambda: int(rng.integers(1, 500)),
    )
    return sources, uids, {name: [makers[i % 3]() for _ in uids] for i, name in enumerate(variables)}


def plain(nested):
    return {key: plain(value) if isinstance(value, dict) else value for key, value in nested.items()}


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(metric_utils, "bootstrap_metric", VERLS)  # put back afterwards
    return resampling.install


def test_every_number_is_verls(installed):
    arguments = validation(7, 6)
    arguments[2]["pred"] = [str(number % 4) for number in range(len(arguments[0]))]  # adds maj@k
    before = plain(process_validation_metrics(*arguments))
    state = np.random.get_state()[1].tolist()
    installed()
    assert metric_utils.bootstrap_metric is resampling.bootstrap_metric
    np.random.seed(1)
    after = plain(process_validation_metrics(*arguments))
    assert after == before
    assert {"mean@6", "best@2/mean", "worst@6/std", "maj@4/mean"} <= before["a"]["acc"].keys()
    assert np.random.get_state()[1].tolist() == state


@pytest.mark.parametrize("size", [2, 3, 16])
def test_any_numbers_and_other_reductions(size):
    rng = np.random.default_rng(size)
    for data in (rng.standard_normal(size).tolist(), [0.1] * size, [True] * size, [np.float32(0.1)] * size):
        for fns in ([np.max, np.min], [np.min]):
            assert resampling.bootstrap_metric(data, size, fns) == VERLS(data, size, fns)
    votes = [{"pred": str(n % 3), "val": float(n)} for n in range(size)]
    majority = [partial(calc_maj_val, vote_key="pred", val_key="val")]
    assert resampling.bootstrap_metric(votes, size, majority) == VERLS(votes, size, majority)
    assert resampling.bootstrap_metric([1.0, 2.0], 2, [np.mean]) == VERLS([1.0, 2.0], 2, [np.mean])


def test_it_takes_a_tenth_of_verls_time_at_most(installed):
    """Ratios, for machines differ; the seconds of 90 problems x 16 samples of seven variables are printed."""

    def seconds(problems):
        arguments = validation(problems, 16, [f"v{number}" for number in range(7)])
        started = time.perf_counter()
        process_validation_metrics(*arguments)
        return time.perf_counter() - started

    verls = min(seconds(3) for _ in range(2))
    installed()
    ours = min(seconds(3) for _ in range(5))
    print(f"3 problems: verl {verls:.2f} s, ours {ours:.3f} s; 90 problems: {seconds(90):.2f} s")
    assert ours < verls / 10
