"""A sample of two_nodes.py: a Ray cluster of two network namespaces, one FSDP rank and one vLLM server on each."""

from pathlib import Path

import pytest
from doors import CANARIES, files_with
from small_run import base_overrides
from two_nodes import ENVIRONMENT, namespaces_of, on_host, ray_cluster, refusal, train, two_hosts

from cppo_verl.run import confidential
from cppo_verl.run.log import read_metrics

pytestmark = [pytest.mark.live, pytest.mark.slow]


def reward_that_needs(name, value, file):
    """Only a response that is graded where the variable is known counts."""
    file.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from rewards import compute_score as plain\n"
        "def compute_score(*arguments, **named):\n"
        f"    assert os.environ[{name!r}].encode().hex() == {value.encode().hex()!r}\n"
        "    return plain(*arguments, **named)\n"
    )
    return f"reward.custom_reward_function.path={file}"


@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
def test_a_cluster_of_two_nodes_trains(live_assets, tmp_path):
    """Its workers have the run's secrets, which no file of the run or of Ray holds."""
    run, name = tmp_path / "two", "OPENAI_API_KEY"
    settings = [
        *(*base_overrides(live_assets), f"run.dir={tmp_path}", "run.name=two", "trainer.total_training_steps=2"),
        *("method.delta=0.004", "method.delta_b=0.0008", "trainer.nnodes=2", "trainer.n_gpus_per_node=1"),
        *(reward_that_needs(name, CANARIES[name], tmp_path / "reward.py"), "trainer.logger=[console,wandb]"),
        f"run.private_variables=[WANDB_API_KEY,HF_TOKEN,{name}]",
    ]
    with two_hosts(), ray_cluster(tmp_path / "ray.log") as (address, ray_files):
        joined = [*settings, f"ray_kwargs.ray_init.address={address}"]
        secrets = {**ENVIRONMENT, **CANARIES, "WANDB_MODE": "offline"}
        with namespaces_of(run, "ray::WorkerDict") as actors, namespaces_of(run, "ray::TopKServer") as servers:
            train(joined, tmp_path / "train.log", on_host(0), secrets)
        assert files_with(CANARIES.values(), tmp_path, ray_files) == []
    assert not (run / confidential.FILE).exists()
    assert len(actors) == len(servers) == 2
    assert actors == servers
    metrics = read_metrics(run)
    assert sorted(metrics) == [1, 2]
    for line in metrics.values():
        assert line["rollout/missing_responses"] == 0
        assert line["trust_region/masked"] > 0
        assert line["actor/grad_norm"] > 0
