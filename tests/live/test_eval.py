"""``cppo eval`` as a person uses it, on the CPU: an unbroken evaluation, and one that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cppo_verl.evaluation.samples import Evaluation

pytestmark = [pytest.mark.live, pytest.mark.slow]
CPPO = Path(sys.executable).parent / "cppo"


def command(live_assets, folder):
    checkpoint, data = str(live_assets / "model"), str(live_assets / "heldout.parquet")
    settings = ["--data", data, "--max-tokens", "40", "--temperature", "1", "--top-p", "1", "--seed", "3"]
    return [str(CPPO), "eval", checkpoint, *settings, "-n", "40", "--out", str(folder)]


def samples(folder):
    return Evaluation.read(folder).samples


@pytest.fixture(scope="module")
def whole(live_assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "whole"
    done = subprocess.run(command(live_assets, folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_an_evaluation_is_complete_and_says_what_it_was_made_with(whole, live_assets):
    folder, output = whole
    assert len(samples(folder)) == 8 * 40
    report = json.loads((folder / "report.json").read_text())
    assert report["benchmarks"]["arithmetic"]["questions"] == 8
    assert sum(report["benchmarks"]["arithmetic"]["outcomes"].values()) == 320
    assert report["benchmarks"]["arithmetic"]["truncated"] > 0  # an untrained model seldom ends
    assert report["settings"]["model"]["source"] == str(live_assets / "model")
    assert report["settings"]["decoding"]["temperature"] == 1.0
    assert report["attempts"][0]["packages"]["verl"] == "0.9.1"
    assert len(report["attempts"]) == 1
    assert "320/320 samples" in output
    assert "Avg@40" in output
    assert "WARNING" not in output


def test_samples_of_a_question_differ_and_lengths_are_tokens(whole):
    found = samples(whole[0])
    texts = {}
    for (_, question, _), sample in found.items():
        texts.setdefault(question, set()).add(sample.response)
        assert 1 <= sample.tokens <= 40
        assert (sample.finish_reason == "length") <= (sample.tokens == 40)
    assert len({sample.seed for sample in found.values()}) == 320
    assert min(map(len, texts.values())) > 20


def test_killed_and_started_again_it_is_what_an_unbroken_one_is(whole, live_assets, tmp_path):
    folder = tmp_path / "broken"
    process = subprocess.Popen(command(live_assets, folder), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 200
    while not (folder / "samples.jsonl").exists() or len((folder / "samples.jsonl").read_bytes().splitlines()) < 40:
        assert time.time() < deadline
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []  # nobody else writes on
    kept = samples(folder)
    assert 0 < len(kept) < 320
    done = subprocess.run(command(live_assets, folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(kept)} are there" in done.stdout
    assert samples(folder) == samples(whole[0])
    assert len(json.loads((folder / "report.json").read_text())["attempts"]) == 2
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 320
    numbers = [json.loads((f / "report.json").read_text())["benchmarks"] for f in (folder, whole[0])]
    assert numbers[0] == numbers[1]


def test_a_finished_evaluation_starts_nothing_and_other_settings_are_refused(whole, live_assets):
    folder, _ = whole
    started = time.time()
    again = subprocess.run(command(live_assets, folder), capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert "Avg@40" in again.stdout
    assert "loading the model" not in again.stdout
    assert time.time() - started < 30
    assert len(json.loads((folder / "report.json").read_text())["attempts"]) == 1
    other = [*command(live_assets, folder), "--temperature", "0.5"]
    refused = subprocess.run(other, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "temperature was 1.0, is 0.5" in refused.stderr
