"""Data preparation: small fixtures of our own, and the public sets where CPPO_DATA_DIR has them."""

import hashlib
import json
import os
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from cppo_verl.cli import main
from cppo_verl.config.check_files import inspect_data_file
from cppo_verl.data.prepare import (
    TEMPLATES,
    Counts,
    Request,
    cleaned,
    deduplicate,
    distinct,
    fingerprint,
    normal_gold,
    prepare,
    unwrap,
)
from cppo_verl.data.sources import DataError, MathProblem, load, table_rows
from cppo_verl.grading import compute_score, grade

DATA = os.environ.get("CPPO_DATA_DIR")
needs_data = pytest.mark.skipif(DATA is None, reason="CPPO_DATA_DIR is not set: the public data sets are not here")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    train = [
        {"problem": "What is 1 + 1?", "answer": "2"},
        {"problem": "What is  1 + 1?", "answer": "02"},  # the same once white space and padding are gone
        {"problem": "What is 1 - 1?", "answer": "0"},  # same letters and digits, another problem
        {"problem": "Name a prime.", "answer": "2"},
        {"problem": "Name a prime.", "answer": "3"},
        {"problem": "What is $2+2$?", "answer": "4"},
        {"problem": "An angle", "answer": r"336^\circ"},
    ]
    held_out = [{"id": "h-1", "problem": "What is 2 + 2 ?", "answer": "4"}]
    return write_lines(tmp_path / "train.jsonl", train), write_lines(tmp_path / "held.jsonl", held_out)


def run(files, out, *options):
    train, held_out = files
    return main(["prepare", "--train", f"toy={train}", "--eval", f"held={held_out}", "--out", str(out), *options])


def test_duplicates_conflicts_and_overlaps_are_removed_and_told(files, tmp_path, capsys):
    out = tmp_path / "data"
    assert run(files, out) == 0
    entry = json.loads((out / "manifest.json").read_text())["sets"]["toy"]
    counts = {name: entry[name] for name in ("rows", "duplicates", "conflicting", "overlapping", "kept")}
    assert counts == {"rows": 7, "duplicates": 1, "conflicting": 2, "overlapping": 1, "kept": 3}
    assert "toy: toy-5 is in held h-1: left out" in capsys.readouterr().out
    rows = parquet.read_table(out / "toy.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["2", "0", "336"]
    assert rows[0]["prompt"][0]["content"].startswith("What is 1 + 1?\n\nPlease reason step by step")
    assert rows[0]["extra_info"]["answer_line"] is False
    assert inspect_data_file(out / "toy.parquet", "prompt") == (None, 3)
    assert entry["sha256"] == hashlib.sha256((out / "toy.parquet").read_bytes()).hexdigest()


def test_the_same_input_gives_the_same_bytes(files, tmp_path):
    for name in ("a", "b"):
        run(files, tmp_path / name)
    for file in ("toy.parquet", "held.parquet", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_dapos_answer_line_template_tells_the_grader(files, tmp_path):
    run(files, tmp_path / "data", "--template", "answer")
    row = parquet.read_table(tmp_path / "data/toy.parquet").to_pylist()[0]
    assert row["extra_info"]["answer_line"] is True
    text = row["prompt"][0]["content"]
    assert text.endswith('Remember to put your answer on its own line after "Answer:".')
    assert unwrap(text) == "What is 1 + 1?"
    # Line breaks that belong to nothing: each may begin what comes last, and is looked at once.
    long = "\n" * 200_000
    started = time.perf_counter()
    assert unwrap(text.replace("What is", f"What{long}is")) == f"What{long}is 1 + 1?"
    assert unwrap(text.replace("What is", f"What{long}is") + " And more.").startswith("Solve the following")
    assert time.perf_counter() - started < 5


def test_a_second_command_keeps_what_the_first_one_recorded(files, tmp_path):
    _, held_out = files
    out = tmp_path / "data"
    run(files, out)
    main(["prepare", "--train", "--eval", f"other={held_out}", "--out", str(out), "--template", "answer"])
    sets = json.loads((out / "manifest.json").read_text())["sets"]
    assert {name: entry["template"] for name, entry in sets.items()} == {
        "toy": "boxed",
        "held": "boxed",
        "other": "answer",
    }


def test_problems_in_other_scripts_are_told_apart(tmp_path):
    rows = [{"problem": text, "answer": "1"} for text in ("求最大值", "求最小值", "Найдите x", "Найдите y")]
    path = write_lines(tmp_path / "x.jsonl", rows)
    assert prepare([Request("x", str(path))], [], tmp_path / "o", "boxed")["sets"]["x"]["kept"] == 4


def test_repeated_ids_are_refused_and_missing_ones_numbered(tmp_path):
    rows = [{"id": number, "problem": f"p{text}", "answer": "1"} for text, number in (("a", None), ("b", None))]
    path = write_lines(tmp_path / "x.jsonl", rows)
    prepare([Request("x", str(path))], [], tmp_path / "o", "boxed")
    ids = [row["extra_info"]["id"] for row in parquet.read_table(tmp_path / "o/x.parquet").to_pylist()]
    assert ids == ["x-0", "x-1"]
    write_lines(path, [row | {"id": "same"} for row in rows])
    with pytest.raises(DataError, match="two problems have the id same"):
        prepare([Request("x", str(path))], [], tmp_path / "o", "boxed")


@pytest.mark.parametrize(
    ("gold", "normal"),
    [
        ("025", "25"),
        ("336^\\circ", "336"),
        ("$34$", "34"),
        ("1,234", "1234"),
        ("-7", "-7"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\text{east}", "\\text{east}"),
    ],
)
def test_golds(gold, normal):
    assert normal_gold(gold) == normal
    assert grade(rf"\boxed{{{gold}}}", normal_gold(gold)).outcome == "right"


def test_repeated_rows_of_the_hub_count_once():
    counts = Counts()
    rows = [MathProblem(str(number), f"problem {number % 3}", "1") for number in range(300)]
    said = []
    assert len(deduplicate(distinct("dapo", rows, said.append), counts)) == 3
    assert (counts.rows, counts.duplicates) == (300, 297)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        ("{", "cannot be read: line 1"),
        ('{"text": "x"}\n', "has none of the columns problem, question, prompt"),
        ('{"problem": "x"}\n', "has none of the columns answer"),
        (
            '{"problem": "x", "answer": "1"}\n{"problem": "", "answer": "1"}\n',
            "row 2 has an empty problem (it has problem, answer)",
        ),
    ],
)
def test_unreadable_files_are_named(tmp_path, capsys, content, message):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["prepare", "--train", f"toy={path}", "--eval", "--out", str(tmp_path / "o")]) == 2
    assert message in capsys.readouterr().err


def test_without_a_network_the_error_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["prepare", "--train", "dapo", "--eval", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "BytedTsinghua-SIA/DAPO-Math-17k cannot be fetched from the hub" in error
    assert "dapo=FILE.jsonl" in error


def test_an_unknown_name_and_a_repeated_one(tmp_path, capsys):
    assert main(["prepare", "--train", "gsm", "--eval", "--out", str(tmp_path)]) == 2
    assert "gsm: not a known data set (dapo, aime24" in capsys.readouterr().err
    with pytest.raises(DataError, match="a name is given twice"):
        prepare([Request("a", "x.jsonl")], [Request("a", "y.jsonl")], tmp_path, "boxed")


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    out = tmp_path_factory.mktemp("public")
    data = Path(DATA)
    held_out = [Request(name, str(data / f"{name}.jsonl")) for name in ("aime24", "aime25", "aime26", "math500")]
    return out, prepare([Request("dapo", str(data / "dapo_math_17k.jsonl"))], held_out, out, "boxed")


@needs_data
def test_public_sets_have_the_known_counts(public):
    sets = public[1]["sets"]
    assert [sets[name]["kept"] for name in ("aime24", "aime25", "aime26", "math500")] == [30, 30, 30, 500]
    dapo = sets["dapo"]
    assert dapo["rows"] == 17917
    rows = list(load("dapo", str(Path(DATA) / "dapo_math_17k.jsonl")).rows)
    assert len({row.problem for row in rows}) == 17290
    assert len({fingerprint(row.problem) for row in rows}) == 16054
    reasons = [removed["reason"] for removed in dapo["removed"] if removed["reason"].startswith("is in ")]
    assert "is in aime26 aime26-I-1" in reasons
    assert sum(reason.startswith("is in math500") for reason in reasons) >= 7


@needs_data
@pytest.mark.parametrize("name", ["aime24", "aime25", "aime26", "math500", "dapo"])
def test_every_gold_is_right_in_its_own_box_as_verl_loads_it(public, live_assets, name, tmp_path):
    """Through verl's own data set, with the keys that its reward loop hands to the reward function."""
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    tokenizer = AutoTokenizer.from_pretrained(live_assets / "model")
    options = OmegaConf.create({"cache_dir": str(tmp_path), "filter_overlong_prompts": False})
    rows = RLHFDataset(str(public[0] / f"{name}.parquet"), tokenizer, options).dataframe
    assert len(rows) == public[1]["sets"][name]["kept"]
    wrong = []
    for row in rows:
        gold = row["reward_model"]["ground_truth"]
        text = rf"Step by step, 1 + 1 = 2. Thus \boxed{{{gold}}}."
        if compute_score(row["data_source"], text, gold, row["extra_info"])["score"] != 1.0:
            wrong.append(gold)
    assert wrong == []


@needs_data
def test_the_hubs_layout_of_dapo_a_hundred_times_over(tmp_path):
    """Its columns, its wrapped prompts and each row ten times (the hub: a hundred) keep what the bare rows keep."""
    import datasets

    rows = [json.loads(line) for line in (Path(DATA) / "dapo_math_17k.jsonl").read_text().splitlines()][:2000]
    wrapped = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": TEMPLATES["answer"].format(problem=row["problem"])}],
            "reward_model": {"ground_truth": row["answer"], "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": str(number)},
        }
        for number, row in enumerate(rows)
    ] * 10
    bare = deduplicate(((cleaned(MathProblem("", r["problem"], r["answer"])), 1) for r in rows), Counts())
    table = datasets.Dataset.from_list(wrapped)
    assert sum(1 for _ in table_rows(table)) == len(wrapped)
    table.to_parquet(tmp_path / "hub.parquet")
    loaded = load("dapo", str(tmp_path / "hub.parquet"))
    counts = Counts()
    kept = deduplicate(((cleaned(row), n) for row, n in distinct("dapo", loaded.rows, print)), counts)
    assert [(row.problem, row.answer) for row in kept] == [(row.problem, row.answer) for row in bare]
    assert counts.rows == 20_000


def _row(gold, content="What is 1 + 1?"):
    reward = {"style": "rule"} if gold is None else {"style": "rule", "ground_truth": gold}
    return {"prompt": [{"role": "user", "content": content}], "data_source": "toy", "reward_model": reward}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_json_lines_are_looked_into_as_parquet_is(name, tmp_path):
    def problem_of(rows):
        path = tmp_path / name
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return inspect_data_file(path, "prompt")

    assert problem_of([_row("2")] * 3) == (None, 3)
    assert problem_of([_row("2"), _row(None), _row("3")])[0] == "has no reward_model.ground_truth in row 2 of 3"
    assert problem_of([_row("2"), {**_row("2"), "prompt": []}])[0] == "has no prompt in row 2 of 2"
    lacking = [{key: value for key, value in _row("2").items() if key != "data_source"}]
    assert problem_of(lacking)[0].startswith("lacks the column data_source (it has ")


def test_broken_json_is_told_and_an_array_left_to_verl(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(_row("2")) + "\n{broken\n")
    assert inspect_data_file(tmp_path / "x.jsonl", "prompt")[0].startswith("is not a readable file of JSON lines: JSON")
    (tmp_path / "x.json").write_text(json.dumps([_row("2")]))
    assert inspect_data_file(tmp_path / "x.json", "prompt")[0] is None
