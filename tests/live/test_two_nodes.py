"""A sample of two_nodes.py: a Ray cluster of two network namespaces, one FSDP rank and one vLLM server on each."""

import pytest
from small_run import base_overrides
from two_nodes import ENVIRONMENT, namespaces_of, on_host, ray_cluster, refusal, train, two_hosts

from cppo_verl.run.log import read_metrics

pytestmark = [pytest.mark.live, pytest.mark.slow]


@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
def test_a_cluster_of_two_nodes_trains(live_assets, tmp_path):
    run = tmp_path / "two"
    settings = [
        *(*base_overrides(live_assets), f"run.dir={tmp_path}", "run.name=two", "trainer.total_training_steps=2"),
        *("method.delta=0.004", "method.delta_b=0.0008", "trainer.nnodes=2", "trainer.n_gpus_per_node=1"),
    ]
    with two_hosts(), ray_cluster(tmp_path / "ray.log") as address:
        joined = [*settings, f"ray_kwargs.ray_init.address={address}"]
        with namespaces_of(run, "ray::WorkerDict") as actors, namespaces_of(run, "ray::TopKServer") as servers:
            train(joined, tmp_path / "train.log", on_host(0), ENVIRONMENT)
    assert len(actors) == len(servers) == 2
    assert actors == servers
    metrics = read_metrics(run)
    assert sorted(metrics) == [1, 2]
    for line in metrics.values():
        assert line["rollout/missing_responses"] == 0
        assert line["trust_region/masked"] > 0
        assert line["actor/grad_norm"] > 0
