"""``cppo overlap``: shares by hand, and every method on a dumped step."""

import json

import pytest
import torch
from inspected_run import CPPO, make_run

from cppo_verl.cli import main
from cppo_verl.config.compose import choices
from cppo_verl.inspection.overlap import compare
from cppo_verl.methods import Outcome, Tokens


def test_shares_by_hand():
    valid = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    tokens = Tokens(*torch.zeros(3, 1, 5), valid, torch.zeros(1, 5))

    def outcome(gate, clipped=None):
        return [Outcome(torch.zeros(1, 5), torch.tensor([gate]), valid, clipped=clipped)]

    cut = torch.tensor([[0, 0, 0, 1, 1]]).bool()
    found = compare(
        {
            "cppo": outcome([0.0, 0.0, 1.0, 1.0, 0.0]),
            "half": outcome([0.0, 1.0, 0.0, 0.5, 0.0], cut),
            "back": outcome([-0.5, 1.5, 1.0, 1.0, 0.0]),
            "none": outcome([1.0, 1.0, 1.0, 1.0, 0.0]),
        },
        [tokens],
    )
    assert found["cppo"] == (0.5, 0.0, None, 1.0, 1.0)
    assert found["half"] == (0.5, 0.25, 0.25, 0.5, 0.5)
    assert found["back"] == (0.25, 0.0, None, 0.5, 1.0)  # pulled back: no update away is left
    assert found["none"] == (0.0, 0.0, None, 0.0, None)


def test_the_command(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=(1, 2), moved=0.6)
    assert main(["overlap", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kl_only = {"trm_max", "trm_avg", "trm_max_avg"}
    assert found["methods"].keys() == set(choices("method")) - kl_only
    assert found["methods"]["cppo"]["masked"] > found["methods"]["dppo"]["masked"] > 0
    assert found["methods"]["dppo"]["in_cppo"] > 0.9  # w_t <= 1 lets CPPO keep a few of them
    assert found["methods"]["cispo"]["masked"] == 0
    assert main(["overlap", str(run), "--step", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("tokens, topk_tv; cppo as trained, others at their defaults")
    assert {line.split()[0] for line in lines[2:-1]} == found["methods"].keys()


@pytest.mark.parametrize(
    ("words", "expected"), [(["--step", "9"], "has no dumped step 9"), ([], "has no dumped step;")]
)
def test_refused(tmp_path, capsys, words, expected):
    run = make_run(tmp_path / "run", steps=() if not words else (1,), method=CPPO)
    assert main(["overlap", str(run), *words]) == 2
    assert expected in capsys.readouterr().err
