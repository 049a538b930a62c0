"""``cppo overlap``: shares by hand, and every method on a dumped step."""

import json

import pytest
import torch
from inspected_run import CPPO, make_run

from cppo_verl.cli import main
from cppo_verl.config.compose import choices
from cppo_verl.inspection.overlap import compare, places
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


def test_places_by_hand():
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    advantages = torch.tensor([[1.0] * 6, [-1.0] * 6])
    divergence = torch.tensor([[0.1, 0.2, 0.3, 0.4, 9.0, 9.0], [0.5, 0.6, 0.7, 0.8, 0.9, torch.nan]])
    tokens = Tokens(*torch.zeros(2, 2, 6), advantages, valid, divergence)

    def outcome(*rows):
        return [Outcome(torch.zeros(2, 6), torch.tensor(rows), valid)]

    ours = outcome([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    theirs = outcome([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0, 0.0, 0.0])
    found = places({"cppo": ours, "other": theirs}, "other", [tokens])
    # (tokens, both, cppo alone, other alone, mean D of cppo's alone, of both); five tokens have quarters 1 1 2 3 4.
    assert found["quarter 1"] == pytest.approx((3, 1 / 3, 0, 1 / 3, None, 0.6))
    assert found["quarter 2"] == (2, 0, 0, 0, None, None)
    assert found["quarter 3"] == pytest.approx((2, 0, 1, 0, (0.3 + 0.8) / 2, None))
    assert found["quarter 4"] == pytest.approx((2, 1, 0, 0, None, (0.4 + 0.9) / 2))
    assert found["A > 0"] == pytest.approx((4, 1 / 4, 1 / 4, 0, 0.3, 0.4))
    assert found["A < 0"] == pytest.approx((5, 2 / 5, 1 / 5, 1 / 5, 0.8, (0.6 + 0.9) / 2))
    assert found["all"] == pytest.approx((9, 3 / 9, 2 / 9, 1 / 9, (0.3 + 0.8) / 2, (0.4 + 0.6 + 0.9) / 3))


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
    assert main(["overlap", str(run), "--where", "dppo", "--json"]) == 0
    everywhere = json.loads(capsys.readouterr().out)["places"]["all"]
    dppo, cppo = found["methods"]["dppo"], found["methods"]["cppo"]
    assert everywhere["tokens"] == found["tokens"]
    assert everywhere["both"] + everywhere["cppo_alone"] == pytest.approx(cppo["masked"])
    assert everywhere["both"] + everywhere["other_alone"] == pytest.approx(dppo["masked"])
    assert everywhere["cppo_alone"] > 0
    assert main(["overlap", str(run), "--where", "dppo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:9].strip() for line in lines[2:-1]] == [
        *(f"quarter {q}" for q in range(1, 5)),
        "A > 0",
        "A < 0",
        "all",
    ]


def test_what_is_no_run(tmp_path, capsys):
    for command in ("overlap", "inspect", "calibrate"):
        assert main([command, str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"cppo {command}: {tmp_path} is not a run folder (no config.yaml)\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--step", "9"], "has no dumped step 9"),
        ([], "has no dumped step;"),
        (["--where", "ppo2"], "--where ppo2: choose one of cppo, aspo, "),
    ],
)
def test_refused(tmp_path, capsys, words, expected):
    run = make_run(tmp_path / "run", steps=() if not words else (1,), method=CPPO)
    assert main(["overlap", str(run), *words]) == 2
    assert expected in capsys.readouterr().err
