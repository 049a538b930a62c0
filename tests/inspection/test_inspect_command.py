"""``cppo inspect``: what it refuses, what it leaves out, what it cannot know."""

import json

import numpy as np
import pytest
import torch
from inspected_run import CPPO, GROUP, WORDS, make_run
from omegaconf import OmegaConf

from cppo_verl.cli import main
from cppo_verl.inspection.page import page
from cppo_verl.inspection.presets import presets
from cppo_verl.inspection.rows import read_step, steps_of
from cppo_verl.inspection.vocabulary import texts


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "r", steps=(2, 10))


def refusal(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_refused(run, tmp_path, capsys):
    assert "config.yaml" in refusal(capsys, tmp_path)
    assert "--step=3: " in (error := refusal(capsys, run, "--step", 3))
    assert "give one of 2, 10" in error
    assert "is a folder; give a file" in refusal(capsys, run, "--out", tmp_path)
    file = run / "dumps/step_2/minibatch0_rank0_micro0.pt"
    dump = torch.load(file)
    torch.save({name: value for name, value in dump.items() if name != "gate"}, file)
    assert f"{file} lacks gate: it is no dump" in refusal(capsys, run)
    file.write_bytes(b"no")
    assert "is damaged" in refusal(capsys, run)
    for file in (run / "dumps/step_2").glob("*"):
        torch.save(dump | {"response_mask": torch.zeros_like(dump["response_mask"])}, file)
    assert "step_2 has no token in the loss" in refusal(capsys, run)
    config = OmegaConf.load(run / "config.yaml")
    del config.divergence.thresholds
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    assert "lacks what method=" in refusal(capsys, run, "--step", 10)
    for folder in (2, 10):
        for file in (run / f"dumps/step_{folder}").glob("*"):
            file.unlink()
    assert "has no dumped step; train with run.dump_steps=[1] or run.inspect_every=50" in refusal(capsys, run)
    assert not (run / "inspect.html").exists()


def test_a_damaged_step_does_not_hinder_another(run, capsys):
    (run / "dumps/step_2/minibatch0_rank0_micro0.pt").write_bytes(b"no")
    assert main(["inspect", str(run), "--step", "10"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("step 10: 16 responses, ")
    assert str(run / "inspect.html") in printed


def test_columns_are_the_dumps(run):
    files = steps_of(run)[2]
    step = read_step(2, files, 10**6, shuffled=True)
    assert sum(one["tokens"] for one in step.responses) == len(step.columns["id"])
    start = 0
    dumps = [torch.load(file) for file in files]
    for index, one in enumerate(step.responses):
        dump, row, end = dumps[index // GROUP], index % GROUP, start + one["tokens"]
        for name in ("log_prob", "rollout_log_prob", "divergence", "advantages", "gate"):
            assert np.array_equal(step.columns[name][start:end], dump[name][row, : one["tokens"]].numpy())
        assert not dump["response_mask"][row, one["tokens"] :].any()
        assert dump["response_mask"][row, one["tokens"] - 1]
        assert one["right"] == bool(dump["advantages"][row, 0] > 0)
        assert one["minibatch"] == index // GROUP
        prompt = step.prompts[one["prompt"]]
        assert prompt == [number for number in dump["prompts"][row].tolist() if number]
        start = end
    assert len(step.prompts) == 2


def test_a_limit_leaves_out_whole_prompts_from_all_over_the_step(tmp_path):
    run = make_run(tmp_path / "r", rows=64)
    files = steps_of(run)[1]
    whole = read_step(1, files, 10**6, shuffled=False)
    half = read_step(1, files, len(whole.columns["id"]) // 2, shuffled=False)
    assert (len(whole.responses), whole.left_out) == (64, 0)
    assert half.left_out == 64 - len(half.responses) == 32
    assert [len([one for one in half.responses if one["prompt"] == place]) for place in range(4)] == [GROUP] * 4
    assert {one["minibatch"] for one in half.responses} == {0, 1}
    assert len(read_step(1, files, 1, shuffled=False).prompts) == 1


def test_verdicts_of_the_dump_come_before_signs(run):
    file = run / "dumps/step_2/minibatch0_rank0_micro0.pt"
    dump = torch.load(file)
    torch.save(dump | {"acc": torch.tensor([1.0, 0.0] * (GROUP // 2))}, file)
    step = read_step(2, steps_of(run)[2], 10**6, shuffled=False)
    assert [one["right"] for one in step.responses[:GROUP]] == [True, False] * (GROUP // 2)


def test_shuffled_weights_and_a_threshold_that_never_binds(tmp_path, capsys):
    run = make_run(tmp_path / "r", method=CPPO | {"weights": "shuffled", "delta_b": float("inf")})
    assert main(["inspect", str(run)]) == 0
    assert '"delta_b": "Infinity"' in (run / "inspect.html").read_text()


def test_without_a_tokenizer_tokens_are_numbers(run, capsys):
    (run / "model/tokenizer.json").unlink()
    assert main(["inspect", str(run)]) == 0
    content = (run / "inspect.html").read_text()
    assert "tokenizer.json was not found on this machine" in content
    assert WORDS[7] not in content
    config = OmegaConf.load(run / "config.yaml")
    for path in ("no/such-model", "not a name/of/anything", None):
        config.actor_rollout_ref.model.path = path
        assert texts(config, [7]) == ({"7": "#7 "}, False)


def test_other_methods_are_at_their_defaults_with_this_runs_thresholds(run):
    config = OmegaConf.load(run / "config.yaml")
    config.divergence.thresholds.dppo_delta = 0.07
    found = {preset["name"]: preset["settings"] for preset in presets(config)}
    assert next(iter(found)) == "cppo"
    assert found["dppo"]["delta"] == 0.07
    assert found["grpo"]["eps_high"] == 0.28
    assert found["trm_max_avg"]["delta_avg"] == 0.002


def test_the_page_is_one_file_that_names_no_other(run):
    assert main(["inspect", str(run)]) == 0
    content = (run / "inspect.html").read_text()
    assert content.count("<script") == 4  # data, two steps, ours
    assert not any(word in content for word in ("src=", "href=", "http:", "https:", "@import", "url("))
    data = content.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["run"] == "r"


def test_the_pages_data_cannot_end_their_element(run):
    step = read_step(2, steps_of(run)[2], 10**6, shuffled=False)
    content = page("</script><b>", [step], [], {"1": "</script><b>%%data%%"}, "")
    assert "</script><b>" not in content
    assert content.count("%%") == 2
