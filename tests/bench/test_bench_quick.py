"""``cppo bench --quick``: what it compares, and that a slowdown to twice the time ends with status 1."""

import json
import subprocess
import sys
import time
from importlib import import_module

import pytest

from cppo_verl.bench import measured, quick
from cppo_verl.bench.cells import MODULES, RECORDS
from cppo_verl.bench.measure.process import measure
from cppo_verl.bench.timing import Effort
from cppo_verl.cli import main

pytestmark = pytest.mark.alone  # it measures time
NAMES = list(quick.GUARDS)


def committed(**limits):
    """A committed file with a median of 2 for every ratio."""
    ratios = {name: {"median": 2.0, "highest": 2.2, "limit": limits.get(name, 3.0)} for name in NAMES}
    return {"date": "2026-11-25", "cpu": "a processor", "ratios": ratios}


def test_a_ratio_above_its_limit_is_named():
    text, failed = quick.comparison(dict.fromkeys(NAMES, 3.0), committed())
    assert failed == []
    assert "0 of 6 above their limits" in text
    assert "ABOVE" not in text
    text, failed = quick.comparison({**dict.fromkeys(NAMES, 2.5), NAMES[1]: 4.0, NAMES[3]: float("nan")}, committed())
    assert failed == [NAMES[1], NAMES[3]]
    assert "2 of 6 above their limits" in text
    (line,) = [line for line in text.splitlines() if line.startswith(NAMES[1])]
    assert line.endswith("ABOVE: 2.00 times the committed ratio")


def test_limits_by_hand():
    mask, update = NAMES[0], NAMES[3]
    alone = [{mask: value, update: 1.0} for value in (10.0, 12.0, 20.0)]
    found = quick.limits(alone, [{mask: 11.0, update: 1.2}])
    assert found[mask] == {"median": 12.0, "highest": 20.0, "limit": 21.6}  # 1.15 x 20 is above 1.8 medians
    assert found[update] == {"median": 1.0, "highest": 1.2, "limit": 1.38}
    assert quick.limits(alone[:1], alone[:1])[mask]["limit"] == 15.0


def test_the_committed_limits_see_twice_the_time():
    content = json.loads(quick.RATIOS.read_text())
    assert list(content["ratios"]) == NAMES
    for ratio in content["ratios"].values():
        assert 1.1 * ratio["median"] < ratio["limit"] < 1.9 * ratio["median"]
        assert ratio["highest"] >= ratio["median"]


def test_one_noisy_measurement_is_repeated(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quick, "RATIOS", tmp_path / "ratios.json")
    quick.RATIOS.write_text(json.dumps(committed()))
    asked, answers = [], [{**dict.fromkeys(NAMES, 2.0), NAMES[2]: 9.0}, {NAMES[2]: 2.1}]
    monkeypatch.setattr(quick, "measure", lambda guards: asked.append(list(guards)) or answers[len(asked) - 1])
    assert main(["bench", "--quick"]) == 0
    assert asked == [NAMES, [NAMES[2]]]
    assert f"measured once more: {NAMES[2]}" in capsys.readouterr().out
    asked.clear()
    answers[1] = {NAMES[2]: 8.0}
    assert main(["bench", "--quick"]) == 1


def test_a_planted_slowdown_is_seen(monkeypatch, tmp_path, capsys):
    """Limits from this machine's own measurement; then ours does its work three times (a busy machine hides twice)."""
    guards = {name: quick.GUARDS[name] for name in NAMES[:2]}
    monkeypatch.setattr(quick, "GUARDS", guards)
    monkeypatch.setattr(quick, "RATIOS", tmp_path / "ratios.json")

    def in_this_process(folder, cells, *_):
        with open(folder / RECORDS, "w") as file:
            file.writelines(json.dumps(measure(cell, Effort(31, 1.5, 9))) + "\n" for cell in cells)
        return 0

    monkeypatch.setattr(quick, "measure_cells", in_this_process)
    runs = [quick.measure(guards)]
    quick.RATIOS.write_text(json.dumps(committed() | {"ratios": quick.limits(runs, runs)}))
    assert main(["bench", "--quick"]) == 0
    for guard in guards.values():
        module = import_module(f"cppo_verl.bench.measure.{MODULES[guard.cell['part']]}")
        original = getattr(module, guard.cell["part"])

        def planted(cell, original=original, name=guard.ours):
            functions, facts = original(cell)
            once = functions[name]
            return {**functions, name: lambda: (once(), once(), once())}, facts

        monkeypatch.setattr(module, guard.cell["part"], planted)
    capsys.readouterr()
    assert main(["bench", "--quick"]) == 1
    output = capsys.readouterr().out
    assert output.count("ABOVE") == 2
    assert "2 of 2 above their limits" in output


def test_the_process_measures_cell_by_cell_and_its_failure_is_told(tmp_path, capsys):
    cells = [{"part": "mask", "responses": 2, "tokens": 64}, {"part": "mask", "responses": 2}]
    status = measured.measure_cells(tmp_path, cells, Effort(5, 1.0), str, {"OMP_NUM_THREADS": "1"})
    assert status == 1
    (record,) = map(json.loads, (tmp_path / RECORDS).read_text().splitlines())
    assert (record["tokens"], record["threads"]) == (64, 1)
    assert {name: len(values) for name, values in record["seconds"].items()} == {"mask": 5, "read": 5}
    output = capsys.readouterr()
    assert "[1/2]" in output.out
    assert "KeyError: 'tokens'" in output.err
    assert "ended with status 1; see" in output.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--write"], "--write renews the ratios of --quick; give both"),
        (["--quick", "method=dppo"], "--costs, --quick and --schedule take no settings; got method=dppo"),
        (["--costs", "x", "method=dppo"], "--costs, --quick and --schedule take no settings; got method=dppo"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, text, capsys):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"cppo bench: {text}\n"


def test_ratios_of_the_cpu_stack_are_not_compared_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(quick, "has_gpu", lambda: True)
    assert main(["bench", "--quick"]) == 2
    assert "--quick compares with ratios of the CPU stack" in capsys.readouterr().err


def test_an_unknown_shape_is_refused(capsys):
    assert main(["bench", "--shape", "Qwen9"]) == 2
    assert "--shape Qwen9: not known; there are Qwen3-1.7B, Qwen3-30B-A3B, Qwen3-8B" in capsys.readouterr().err


def test_costs_and_quick_are_two_commands():
    with pytest.raises(SystemExit):
        main(["bench", "--costs", "x", "--quick"])


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    """50 s on a quiet machine; how long it takes says nothing about the ratios."""
    started = time.monotonic()
    command = [sys.executable, "-m", "cppo_verl.cli", "bench", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    seconds = time.monotonic() - started
    print(f"{done.stdout}\n{done.stderr}\n{seconds:.0f} s")
    assert done.returncode == 0
    assert "0 of 6 above their limits" in done.stdout
