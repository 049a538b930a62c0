"""Runs in groups, their names, curves with the range of the seeds, |pi - mu| by position, and the files written."""

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from run_folders import make_run

from cppo_verl.cli import main
from cppo_verl.figures import curves, positions
from cppo_verl.figures.plots import plot_runs
from cppo_verl.figures.runs import Run, grouped

matplotlib.use("Agg")


@pytest.fixture
def folder(tmp_path):
    """``folder(name, overrides..., metrics=...)`` makes a run and reads it."""

    def made(name, *overrides, **content):
        return Run.read(make_run(tmp_path / "runs" / name, *overrides, **content))

    return made


def test_seeds_are_one_group_and_other_settings_are_not(folder):
    runs = [
        folder("a", "run.seed=1"),
        folder("b", "run.seed=2", "trainer.total_training_steps=7", "run.dump_steps=[3]"),
        folder("c", "method=dppo"),
        folder("d", "method.delta_b=0.06"),
        folder("e", "method.delta_b=0.06", "actor_rollout_ref.actor.optim.lr=1e-3"),
    ]
    groups = grouped(runs)
    assert [[run.folder.name for run in group.runs] for group in groups] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [group.name for group in groups] == [
        "cppo delta_b=0.015 lr=0.0002 (2 runs)",
        "dppo lr=0.0002",
        "cppo delta_b=0.06 lr=0.0002",
        "cppo delta_b=0.06 lr=0.001",
    ]


def test_one_group_is_called_by_its_method_alone(folder):
    assert [group.name for group in grouped([folder("a"), folder("b", "run.seed=3")])] == ["cppo (2 runs)"]


def test_what_no_naming_setting_tells_apart_has_its_folders_name(folder):
    groups = grouped([folder("a"), folder("b", "data.max_prompt_length=40")])
    assert [group.label for group in groups] == ["cppo [a]", "cppo [b]"]


def test_other_data_or_another_model_is_another_group(folder):
    runs = [folder("a"), folder("b", "data.train_files=/elsewhere/other.parquet")]
    runs += [folder("c", "data.train_files=/elsewhere/train.parquet"), folder("d", "actor_rollout_ref.model.path=/m/x")]
    assert [[run.folder.name for run in group.runs] for group in grouped(runs)] == [["a", "c"], ["b"], ["d"]]
    assert grouped(runs)[2].label == "cppo x"


def drawn(panel, groups):
    axis = Figure().subplots()
    colours = {group.label: colour for group, colour in zip(groups, curves.COLOURS, strict=False)}
    curves.draw(axis, panel, groups, colours)
    return panel.has_numbers(groups), axis, [line.get_ydata().tolist() for line in axis.lines if len(line.get_ydata())]


def test_a_curve_is_the_mean_of_the_seeds_at_the_steps_that_all_have(folder):
    reward = "critic/score/mean"
    first = folder("a", metrics={1: {reward: 0.2}, 2: {reward: 0.4}, 3: {reward: 0.9}})
    second = folder("b", "run.seed=2", metrics={1: {reward: 0.4}, 2: {reward: None}, 3: {reward: 0.5}, 4: {reward: 1}})
    (group,) = grouped([first, second])
    assert group.curve(curves.metric(reward)) == ([1, 3], [[0.2, 0.4], [0.9, 0.5]])
    some, axis, lines = drawn(curves.Panel("reward", {"": curves.metric(reward)}), [group])
    assert some
    assert lines == [[pytest.approx(0.3), pytest.approx(0.7)]]
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 0.9))  # the range of the seeds


def test_several_lines_of_several_groups_are_told_apart(folder):
    names = {"trust_region/masked_by_token": 0.01, "trust_region/masked_by_prefix": 0.03}
    groups = grouped([folder("a", metrics={1: names}), folder("b", "method=dppo", metrics={1: names})])
    panel = curves.trust_region_panels()[0]
    _, axis, lines = drawn(panel, groups)
    assert lines == [[1.0], [3.0], [1.0], [3.0]]
    styles = [(line.get_color(), line.get_linestyle()) for line in axis.lines if len(line.get_ydata())]
    assert len(set(styles)) == 4
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["token", "prefix"]
    quarters = next(panel for panel in curves.trust_region_panels() if "quarter" in panel.title)
    assert list(quarters.shown(1)) == ["first", "second", "third", "last"]
    assert list(quarters.shown(2)) == ["first", "last"]


def test_a_name_is_no_formula_and_no_escape_sequence(folder):
    hostile = "val-core/$\\frac{$\x1b[31m/acc/mean@16"
    groups = grouped([folder("a", metrics={1: {hostile: 0.5}})])
    panels = curves.validation_panels(groups)
    figure = Figure()
    curves.draw(figure.subplots(), panels[0], groups, {groups[0].label: "black"})
    figure.savefig("/dev/null", format="png")  # a formula that cannot be read would raise here
    assert "\x1b" not in figure.axes[0].get_title()


def test_validation_has_a_panel_a_benchmark_and_their_mean(folder):
    line = {f"val-core/aime{year}/acc/mean@16": year / 100 for year in (24, 25, 26)} | {
        "val-core/aime_mean/acc/mean@16": 0.25
    }
    groups = grouped([folder("a", metrics={10: line})])
    found = {panel.title: drawn(panel, groups)[2] for panel in curves.validation_panels(groups)}
    assert found == {"aime24 Avg@16": [[24.0]], "aime25 Avg@16": [[25.0]], "aime26 Avg@16": [[26.0]], "mean": [[25.0]]}


def test_ablations_have_a_panel_a_setting_beside_the_reference(folder):
    line = {1: {"val-core/toy/acc/mean@4": 0.5}}
    runs = [
        folder("w6", "method.w_min=0.6", metrics=line),
        folder("b2", "method.delta_b=0.02", metrics=line),
        folder("b3", "method.delta_b=0.03", metrics=line),
        folder("own", metrics=line),
        folder("dppo", "method=dppo", metrics=line),
    ]
    panels = curves.ablation_panels(grouped(runs))
    names = {panel.title: [group.runs[0].folder.name for group in groups] for panel, groups in panels}
    assert names == {"w_min": ["own", "w6"], "delta_b": ["own", "b2", "b3"], "method": ["own", "dppo"]}
    assert curves.ablation_panels(grouped(runs[:2])) == []


def dump(run, step, **tensors):
    path = run.folder / f"dumps/step_{step}/minibatch0_rank0_micro0.pt"
    path.parent.mkdir(parents=True)
    torch.save(tensors, path)


def test_gaps_by_position_against_a_loop(folder):
    run = folder("a")
    draw = torch.Generator().manual_seed(0)
    log_mu = -3 * torch.rand(60, 100, generator=draw)
    log_pi = (log_mu + 0.3 * torch.randn(60, 100, generator=draw)).clamp_max(0)
    lengths = torch.randint(50, 101, (60,), generator=draw)
    mask = torch.arange(100) < lengths[:, None]
    mask[:, 7] = False  # a hole: positions count valid tokens
    weights = torch.rand(60, 100, generator=draw) * 0.5 + 0.5
    dump(run, 1, log_prob=log_pi, rollout_log_prob=log_mu, response_mask=mask, weights=weights.masked_fill(~mask, 0))
    found = positions.by_position([run])
    tokens = [
        (sum(mask[row, : place + 1]).item(), (log_pi[row, place].exp() - log_mu[row, place].exp()).abs().item(),
         0.15 / weights[row, place].item())
        for row in range(60) for place in range(100) if mask[row, place]
    ]  # fmt: skip
    assert 30 < len(found.position) < positions.BINS  # the last ones have too few tokens
    width = (found.position[-1] - found.position[0]) / (len(found.position) - 1)
    for number in (0, 10, -1):
        middle = found.position[number]
        inside = [token for token in tokens if abs(token[0] - middle) <= width / 2]
        gaps = sorted(gap for _, gap, _ in inside)
        assert found.mean[number] == pytest.approx(sum(gaps) / len(gaps), rel=0.3)  # bins are whole tokens wide
        assert found.tail[number] > found.mean[number]
    assert sum(gap for _, gap, _ in tokens) / len(tokens) == pytest.approx(found.mean.mean(), rel=0.05)
    assert found.threshold.mean() == pytest.approx(0.15 * sum(t / 0.15 for *_, t in tokens) / len(tokens), rel=0.05)


def test_short_responses_have_a_bin_a_position_by_hand(folder):
    run = folder("a", "method=grpo")
    log_mu = torch.full((40, 3), 0.5).log()
    log_pi = torch.tensor([0.5, 0.6, 0.9]).log().expand(40, 3).clone()
    log_pi[:4, 1] = 0.0  # |pi - mu| = 0.5: the largest tenth
    dump(run, 1, log_prob=log_pi, rollout_log_prob=log_mu, response_mask=torch.ones(40, 3))
    found = positions.by_position([run])
    assert found.position.tolist() == [1, 2, 3]
    assert found.mean.tolist() == pytest.approx([0, 0.9 * 0.1 + 0.1 * 0.5, 0.4])
    assert found.tail.tolist() == pytest.approx([0, 0.5, 0.4])
    assert found.threshold is None  # GRPO compares no D with a threshold


def test_the_command_draws_what_the_runs_have(folder, tmp_path, capsys):
    line = {"critic/score/mean": 0.5, "trust_region/masked_by_token": 0.1, "val-core/toy/acc/mean@4": 0.5}
    runs = [folder(name, *more, metrics={1: line, 2: line}) for name, *more in (("a",), ("b", "method=dppo"))]
    paths = [str(run.folder) for run in runs]
    assert main(["plot", *paths, "--out", str(tmp_path / "out")]) == 0
    names = {f"{name}.{kind}" for name in ("validation", "training", "trust_region") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert "<svg" in (tmp_path / "out/training.svg").read_text()
    assert main(["plot", paths[0]]) == 0
    assert (runs[0].folder / "plots/training.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "is not a run folder (no metrics.jsonl)" in capsys.readouterr().err


def test_a_run_without_numbers_has_no_figure(folder, tmp_path):
    assert plot_runs([folder("a").folder], tmp_path / "out") == []
