"""Command lines that are wrong, and odd ones that are right: refused in one line that names the cause, or done.

Everything runs in this process; nothing may be started.
"""

import copy
import json
import re
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from omegaconf import OmegaConf
from test_schema import WRONG

from cppo_verl import cli
from cppo_verl.config.compose import compose
from cppo_verl.config.validate import validate
from cppo_verl.evaluation.samples import Question, Sample, content_hashes
from cppo_verl.problems import ConfigError
from cppo_verl.run import supervisor
from cppo_verl.run.manifest import manifest

CHAT = [{"role": "user", "content": "1+1?"}]
GOLD = {"ground_truth": "2", "style": "rule"}
LONG = "x" * 300


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    def start(*_):
        raise AssertionError("a process was started")

    monkeypatch.setattr(supervisor, "start", start)


@pytest.fixture(scope="module")
def place(tmp_path_factory, live_assets):
    """A folder with good and bad files of every kind that a command reads; ``assets`` in it is a model and its data."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "assets").symlink_to(live_assets)
    (folder / "folder").mkdir()
    (folder / "file").write_text("hello")
    problems(folder)
    data_files(folder)
    models(folder, live_assets)
    evaluations(folder)
    runs(folder)
    return folder


def problems(folder):
    """For cppo prepare."""
    row = {"problem": "What is 1+1?", "answer": "2"}
    texts = {
        "good": json.dumps(row),
        "empty": "",
        "blank": "\n\n",
        "no_json": "hello",
        "bad_second": json.dumps(row) + "\n{",
        "list": "[1, 2]",
        "number": "5",
        "deep": '{"problem": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "surrogate": r'{"problem": "a \ud800 b", "answer": "2"}',
        "long_gold": json.dumps({**row, "answer": "9" * 10_000}),
        "long_number": '{"problem": "x", "answer": ' + "9" * 10_000 + "}",
        "messages_text": json.dumps({"prompt": ["1+1?"], "answer": "2"}),
        "messages_numbers": json.dumps({"prompt": [{"role": "user", "content": 3}], "answer": "2"}),
        "no_messages": json.dumps({"prompt": [], "answer": "2"}),
        "no_answer": json.dumps({"problem": "x"}),
        "null_answer": json.dumps(row) + "\n" + json.dumps({**row, "answer": None}),
        "empty_answer": json.dumps({**row, "answer": " "}),
        "list_answer": json.dumps({**row, "answer": ["2"]}),
        "true_answer": json.dumps({**row, "answer": True}),
        "nan_answer": '{"problem": "x", "answer": NaN}',
        "dict_problem": json.dumps({**row, "problem": {"a": 1}}),
        "many_columns": json.dumps({f"column {number}": 1 for number in range(1000)}),
        "same_ids": "\n".join(json.dumps({"problem": f"p{n}", "answer": "1", "id": 7}) for n in range(2)),
        "conflicts": "\n".join(json.dumps({"problem": "p", "answer": str(n)}) for n in range(2)),
        "foreign_digits": json.dumps({**row, "answer": "\uff12"}),
        "escape": json.dumps({**row, "id": "[/x]\x1b[31m"}),
    }
    for name, text in texts.items():
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "latin.jsonl").write_bytes('{"problem": "é", "answer": "2"}'.encode("latin-1"))
    (folder / "zeros.jsonl").write_bytes(b"\0" * 100)
    (folder / "text.parquet").write_text("hello")
    (folder / "cut.parquet").write_bytes((folder / "assets" / "train.parquet").read_bytes()[:-9])
    for name, text in {"damaged": "{", "a_list": "[]", "no_sets": "{}"}.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(text)


def data_files(folder):
    """For cppo train and cppo eval."""
    plain = {"prompt": [CHAT] * 4, "data_source": ["x"] * 4, "reward_model": [GOLD] * 4}
    cases = {
        "null_gold": {**plain, "reward_model": [GOLD, {**GOLD, "ground_truth": None}, GOLD, None]},
        "null_reward": {**plain, "reward_model": pa.array([None] * 4, pa.struct([("ground_truth", pa.string())]))},
        "no_struct": {**plain, "reward_model": ["2"] * 4},
        "null_column": {**plain, "reward_model": pa.nulls(4)},
        "empty_prompt": {**plain, "prompt": [CHAT, CHAT, [], None]},
        "null_content": {**plain, "prompt": [CHAT, CHAT, CHAT, [{"role": "user", "content": None}]]},
        "text_prompt": {**plain, "prompt": ["1+1?"] * 4},
        "null_source": {**plain, "data_source": ["x", None, "x", "x"]},
        "few": plain,
        "no_rows": {name: pa.array([], pa.array(values).type) for name, values in plain.items()},
        "many_nulls": {
            "prompt": [CHAT] * 20_000,
            "data_source": ["x"] * 20_000,
            "reward_model": pa.array([{"ground_truth": None}] * 20_000, pa.struct([("ground_truth", pa.string())])),
        },
    }
    for name, columns in cases.items():
        parquet.write_table(pa.table(columns), folder / f"{name}.parquet")


def models(folder, assets):
    for name, config in {
        "corrupt": "{",
        "deep_config": "[" * 100_000,
        "list_config": "[]",
        "no_type": "{}",
        "no_weights": (assets / "model" / "config.json").read_text(),
    }.items():
        (folder / f"model_{name}").mkdir()
        (folder / f"model_{name}" / "config.json").write_text(config)
    (folder / "model_empty").mkdir()
    (folder / "model_no_tokenizer").mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / "model_no_tokenizer" / file).symlink_to(assets / "model" / file)


def evaluations(folder):
    """For cppo report and cppo compare."""
    question = asdict(Question("[/x]\x1b[31m\u202e$\\frac", "0", CHAT, "2"))
    samples = [
        asdict(Sample(question["benchmark"], "0", number, 7, "so", 10, "stop", "right", "9" * 5000))
        for number in range(2)
    ]
    settings = {
        "model": {"source": "/m", "name": "[red]m", "sha256": "a"},
        "questions": content_hashes([Question(**question)]),
        "decoding": {"n": 2, "temperature": 1.0},
        "chat": {"arguments": {}, "template_sha256": "c"},
        "reward": {"path": "pkg://cppo_verl.grading", "name": "compute_score", "kwargs": {}, "sha256": None},
    }
    whole = {"settings": settings, "attempts": [manifest(["cppo"])]}

    def write(name, record=None, questions=(question,), lines=tuple(samples), tail=b""):
        target = folder / f"eval_{name}"
        target.mkdir()
        asked = {"questions": content_hashes([Question(**line) for line in questions])}
        record = {**whole, "settings": settings | asked} if record is None else record
        (target / "manifest.json").write_text(record if isinstance(record, str) else json.dumps(record))
        (target / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (target / "samples.jsonl").write_bytes(text.encode() + tail)

    write("good")
    write("cut", tail=b'{"benchmark": "x", "ques')
    write("inner", lines=(samples[0], '{"bench', samples[1]))
    write("list_line", lines=("[]", *samples))
    write("deep_line", lines=("[" * 100_000, *samples))
    write("latin", tail=b'{"a": "\xe9"}\n')
    write("extra", lines=({**samples[0], "more": 1}, samples[1]))
    write("lacking", lines=({"benchmark": "x"}, samples[1]))
    write("types", lines=({**samples[0], "sample": "0"}, samples[1]))
    write("outcome", lines=({**samples[0], "outcome": "perfect"}, samples[1]))
    write("foreign", lines=({**samples[0], "question": "9"}, samples[1]))
    write("incomplete", lines=samples[:1])
    write("no_questions", questions=())
    write("bad_question", questions=({**question, "prompt": "1+1?"},))
    write(
        "surrogate",
        questions=({**question, "benchmark": "\ud800"},),
        lines=[{**s, "benchmark": "\ud800"} for s in samples],
    )
    write("empty_manifest", record="")
    write("brace_manifest", record="{")
    write("list_manifest", record="[]")
    write("no_settings", record={"attempts": []})
    for name, n in (("n0", 0), ("n_text", "2"), ("n_null", None)):
        write(name, record={**whole, "settings": {**settings, "decoding": {"n": n}}})
    write("no_packages", record={**whole, "attempts": [{}]})
    write("text_attempts", record={**whole, "attempts": ["x"]})


def runs(folder):
    """For cppo plot, merge, eval and train."""
    nodes = "actor_rollout_ref: {}\ndata: {}\ntrainer: {}\n"
    grpo = "method: {_target_: cppo_verl.methods.Grpo, name: grpo}\n"
    step = json.dumps({"step": 1, "time": 1, "critic/score/mean": 0.5, "val-core/$\\frac[/x]/acc/mean@4": 0.5}) + "\n"

    def write(name, metrics=step, config=None):
        target = folder / f"run_{name}"
        target.mkdir()
        (target / "metrics.jsonl").write_bytes(metrics if isinstance(metrics, bytes) else metrics.encode())
        own = f"{nodes}run: {{dir: {folder}, name: run_{name}}}\n{grpo}"
        (target / "config.yaml").write_text(own if config is None else config)
        (target / "manifest.json").write_text("{}")
        return target

    write("good")
    write("latin", metrics=b'{"step": 1, "x": "\xe9"}\n')
    write("inner", metrics="{\n" + step)
    write("list", metrics="[]\n")
    write("no_step", metrics="{}\n")
    write(
        "text_values",
        metrics=json.dumps({"step": 1, "critic/score/mean": "high", "val-core/x/acc/mean@4": "low"}) + "\n",
    )
    write("no_metrics", metrics="")
    (write("plots_file") / "plots").write_text("")
    for name, text in {"yaml": "{\n", "empty_config": "", "list_config": "[]\n", "no_nodes": "a: 1\n"}.items():
        dumps = write(name, config=text) / "dumps" / "step_1"
        dumps.mkdir(parents=True)
        torch.save({}, dumps / "minibatch0.pt")
    dumps = write("bad_dump", config=nodes + "run: {}\nmethod: {_target_: cppo_verl.methods.Cppo, delta: 1, "
                  "delta_b: 1, weights: linear, soft_gate: false, w_min: 1}\n") / "dumps" / "step_1"  # fmt: skip
    dumps.mkdir(parents=True)
    (dumps / "minibatch0.pt").write_text("hello")
    shards = write("shards") / "checkpoints" / "global_step_5" / "actor"
    shards.mkdir(parents=True)
    (shards / "fsdp_config.json").write_text("{")
    shards = write("no_ranks") / "checkpoints" / "global_step_5" / "actor"
    shards.mkdir(parents=True)
    (shards / "fsdp_config.json").write_text("{}")
    shards = write("lost_rank") / "checkpoints" / "global_step_5" / "actor"
    shards.mkdir(parents=True)
    (shards / "fsdp_config.json").write_text('{"world_size": 2}')
    shards = write("ranks") / "checkpoints" / "global_step_5" / "actor"
    shards.mkdir(parents=True)
    (shards / "fsdp_config.json").write_text('{"world_size": 1}')
    (shards / "model_world_size_1_rank_0.pt").write_text("")
    shards = write("nowhere", config=f"{nodes}run: {{}}\n{grpo}") / "checkpoints" / "global_step_5" / "actor"
    shards.mkdir(parents=True)
    (shards / "fsdp_config.json").write_text("{}")
    (folder / "run_latest").mkdir()
    (folder / "run_latest" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe" * 400)


def run(command, capsys):
    """(exit status, output, lines of errors without argparse's usage)."""
    try:
        status = cli.main(command)
    except SystemExit as error:
        status = error.code
    output, errors = capsys.readouterr()
    lines = errors.splitlines()
    usage = next((place for place, line in enumerate(lines) if line.startswith("usage: ")), None)
    if usage is not None:
        lines = lines[-1:]
    return status, output, lines


def visible(text):
    return all(character.isprintable() or character in "\n\t" for character in text)


PREPARE = [
    ("prepare --out OUT --train a={no_json.jsonl} --eval", "a: {no_json.jsonl} cannot be read: line 1"),
    ("prepare --out OUT --train a={bad_second.jsonl} --eval", "line 2"),
    ("prepare --out OUT --train a={empty.jsonl} --eval", "{empty.jsonl} is empty"),
    ("prepare --out OUT --train a={blank.jsonl} --eval", "{blank.jsonl} is empty"),
    ("prepare --out OUT --train a={list.jsonl} --eval", "line 1 is not a JSON object"),
    ("prepare --out OUT --train a={number.jsonl} --eval", "line 1 is not a JSON object"),
    ("prepare --out OUT --train a={deep.jsonl} --eval", "{deep.jsonl} cannot be read: line 1"),
    ("prepare --out OUT --train a={surrogate.jsonl} --eval", "row 1 has a lone surrogate"),
    ("prepare --out OUT --train a={long_gold.jsonl} --eval", "row 1 has an answer of over 500 characters"),
    ("prepare --out OUT --train a={long_number.jsonl} --eval", "line 1"),
    ("prepare --out OUT --train a={messages_text.jsonl} --eval", "row 1 has a prompt that is no list of chat messages"),
    ("prepare --out OUT --train a={messages_numbers.jsonl} --eval", "row 1 has a prompt that is no list of chat"),
    ("prepare --out OUT --train a={no_messages.jsonl} --eval", "row 1 has an empty prompt"),
    ("prepare --out OUT --train a={no_answer.jsonl} --eval", "has none of the columns answer"),
    ("prepare --out OUT --train a={null_answer.jsonl} --eval", "row 2 has no answer"),
    ("prepare --out OUT --train a={empty_answer.jsonl} --eval", "row 1 has an empty answer"),
    ("prepare --out OUT --train a={list_answer.jsonl} --eval", "row 1 has an answer that is neither text nor a number"),
    ("prepare --out OUT --train a={true_answer.jsonl} --eval", "row 1 has an answer that is neither text nor a number"),
    ("prepare --out OUT --train a={nan_answer.jsonl} --eval", "row 1 has an answer that is neither text nor a number"),
    ("prepare --out OUT --train a={dict_problem.jsonl} --eval", "row 1 has a problem that is not text"),
    ("prepare --out OUT --train a={many_columns.jsonl} --eval", "column 9 and 990 more)"),
    ("prepare --out OUT --train a={same_ids.jsonl} --eval", "two problems have the id 7"),
    ("prepare --out OUT --train a={conflicts.jsonl} --eval", "a: no problem is left"),
    ("prepare --out OUT --train a={latin.jsonl} --eval", "{latin.jsonl} cannot be read"),
    ("prepare --out OUT --train a={zeros.jsonl} --eval", "line 1"),
    ("prepare --out OUT --train a={text.parquet} --eval", "{text.parquet} cannot be read"),
    ("prepare --out OUT --train a={cut.parquet} --eval", "{cut.parquet} cannot be read"),
    ("prepare --out OUT --train a={folder} --eval", "{folder} is a folder; give a file"),
    ("prepare --out OUT --train a={none.jsonl} --eval", "{none.jsonl} does not exist"),
    ("prepare --out OUT --train nothing --eval", "nothing: not a known data set"),
    ("prepare --out OUT --train a/b={good.jsonl} --eval", "give NAME or NAME=FILE"),
    ("prepare --out OUT --train ={good.jsonl} --eval", "give NAME or NAME=FILE"),
    ("prepare --out OUT --train ..={good.jsonl} --eval", "give NAME or NAME=FILE"),
    (f"prepare --out OUT --train {LONG}={{good.jsonl}} --eval", "at most 100 letters"),
    ("prepare --out OUT --train a={good.jsonl} --eval a={good.jsonl}", "a name is given twice"),
    ("prepare --out OUT --train a={good.jsonl} --eval b={good.jsonl}", "a: no problem is left"),
    ("prepare --out OUT --train --eval", "nothing to prepare"),
    ("prepare --out {file} --train a={good.jsonl} --eval", "--out {file} is a file"),
    (f"prepare --out {{folder}}/{LONG} --train a={{good.jsonl}} --eval", "File name too long"),
    ("prepare --out {damaged} --train a={good.jsonl} --eval", "{damaged}/manifest.json:1: is damaged"),
    ("prepare --out {a_list} --train a={good.jsonl} --eval", "manifest.json:1: is damaged (no JSON object)"),
    ("prepare --out {no_sets} --train a={good.jsonl} --eval", "manifest.json:1: lacks sets"),
    ("prepare --template none", "invalid choice: 'none'"),
    ("prepare --outt x", "unrecognized arguments: --outt"),
]
REPORT = [
    ("report {none}", "{none} is not an evaluation"),
    ("report {folder}", "{folder} is not an evaluation"),
    ("report {file}", "{file} is not an evaluation"),
    ("report {eval_inner}", "{eval_inner}/samples.jsonl:2: is damaged"),
    ("report {eval_list_line}", "samples.jsonl:1: is damaged (no JSON object)"),
    ("report {eval_deep_line}", "samples.jsonl:1: is damaged (too deeply nested)"),
    ("report {eval_latin}", "samples.jsonl:3: is damaged (not text)"),
    ("report {eval_extra}", "samples.jsonl:1: is no sample of an evaluation; delete that line"),
    ("report {eval_lacking}", "samples.jsonl:1: is no sample of an evaluation; delete that line"),
    ("report {eval_types}", "samples.jsonl:1: is no sample of an evaluation (sample has another type)"),
    ("report {eval_outcome}", "samples.jsonl:1: names a question or outcome that there is not"),
    ("report {eval_foreign}", "samples.jsonl:1: names a question or outcome that there is not"),
    ("report {eval_incomplete}", "is incomplete: 1 of 2 samples are there"),
    ("report {eval_no_questions}", "questions.jsonl:1: is empty"),
    ("report {eval_bad_question}", "questions.jsonl:1: is no question of an evaluation (prompt has another type)"),
    ("report {eval_empty_manifest}", "manifest.json:1: is empty"),
    ("report {eval_brace_manifest}", "manifest.json:1: is damaged"),
    ("report {eval_list_manifest}", "manifest.json:1: is damaged (no JSON object)"),
    ("report {eval_no_settings}", "manifest.json:1: lacks settings"),
    ("report {eval_n0}", "manifest.json:1: has no usable settings.decoding.n"),
    ("report {eval_n_text}", "has no usable settings.decoding.n"),
    ("report {eval_n_null}", "has no usable settings.decoding.n"),
    ("report {eval_no_packages}", "has no usable attempts.packages"),
    ("report {eval_text_attempts}", "has no usable attempts"),
    (f"report {LONG}", "File name too long"),
    ("report", "the following arguments are required: evaluation"),
    ("report {eval_good} extra", "unrecognized arguments: extra"),
    ("report {eval_good} --sure", "unrecognized arguments: --sure"),
    ("compare {eval_good}", "the following arguments are required: B"),
    ("compare {eval_good} {folder}", "{folder} is not an evaluation"),
    ("compare {eval_good} {eval_inner}", "samples.jsonl:2: is damaged"),
    ("compare {eval_good} {eval_good}", "needs at least two questions"),
    ("compare {eval_good} {eval_surrogate}", "share no benchmark"),
]
EVAL = [
    ("eval {none}", "{none} does not exist"),
    ("eval {folder}", "{folder} holds no model"),
    ("eval {file}", "{file} holds no model"),
    ("eval {model_no_weights}", "holds no model"),
    ("eval {model_empty}", "holds no model"),
    ("eval ~nobody/x/y", "~nobody/x/y does not exist"),
    ("eval {run_shards} --data {few.parquet}", "holds no model"),
    (
        "eval {run_shards}/checkpoints/global_step_5 --data {few.parquet}",
        "config.yaml:1: lacks reward",
    ),
    ("eval {assets}/model --data {null_reward.parquet}", "has no reward_model.ground_truth in 4 of 4 rows"),
    ("eval {assets}/model --data {null_gold.parquet}", "has no reward_model.ground_truth in rows 2 and 4 of 4"),
    ("eval {assets}/model --data {null_column.parquet}", "has a reward_model without ground_truth"),
    ("eval {assets}/model --data {empty_prompt.parquet}", "has no prompt in rows 3 and 4 of 4"),
    ("eval {assets}/model --data {none.parquet}", "{none.parquet} does not exist"),
    ("eval {assets}/model --data {folder}", "{folder} is a folder"),
    ("eval {assets}/model --data {good.jsonl}", "is not a parquet file"),
    ("eval {assets}/model --data {file}", "is none of .parquet, .json and .jsonl"),
    ("eval {assets}/model --data {text.parquet}", "is not a readable parquet file"),
    ("eval {assets}/model --data {few.parquet} --out {file}", "{file} cannot be written"),
    ("eval {assets}/model --data {few.parquet} --out OUT --temperature 0 -n 4", "use -n 1"),
    ("eval {assets}/model --data {few.parquet} --out OUT2 --max-tokens 1000000", "--max-tokens 1000000 leaves no room"),
    ("eval {model_no_tokenizer} --data {few.parquet} --out OUT3", "has no chat template"),
    ("eval {assets}/model --data {null_content.parquet}", "has a message without content in its prompt in row 4 of 4"),
    ("eval x -n 0", "argument -n: must be a whole number, 1 or more; got 0"),
    ("eval x -n two", "argument -n: must be a whole number, 1 or more; got two"),
    ("eval x -n 1.5", "argument -n"),
    (f"eval x -n {'9' * 5000}", "argument -n"),
    ("eval x --temperature -1", "argument --temperature: must be a number, 0 or more"),
    ("eval x --temperature nan", "argument --temperature"),
    ("eval x --temperature inf", "argument --temperature"),
    ("eval x --top-p 2", "argument --top-p: must be a number, 0 to 1"),
    ("eval x --top-p abc", "argument --top-p"),
    ("eval x --seed -1", "argument --seed"),
    ("eval x --seed abc", "argument --seed: must be a whole number, 0 or more; got abc"),
    ("eval x --limit 0", "argument --limit"),
    ("eval x --max-tokens -5", "argument --max-tokens"),
    ("eval x --tensor-parallel 0", "argument --tensor-parallel"),
    ("eval x --data", "argument --data: expected at least one argument"),
    ("eval", "the following arguments are required: CHECKPOINT"),
    ("eval {folder} --all", "is not a run folder with checkpoints"),
    ("eval {folder} --all --out x", "--out names the folder of one evaluation"),
]
OTHERS = [
    ("merge", "the following arguments are required: CHECKPOINT"),
    ("merge {none}", "{none} does not exist: give a run folder"),
    ("merge {folder}", "holds no model"),
    ("merge {file}", "holds no model"),
    ("merge {run_latest}", "holds no model"),
    ("merge {assets}/model", "is a Hugging Face folder already"),
    ("merge {assets}/model --out {folder}", "--out {folder} exists"),
    ("merge {run_good}", "holds no model"),
    ("merge {run_shards}/checkpoints/global_step_5", "fsdp_config.json:1: is damaged"),
    ("merge {run_nowhere}/checkpoints/global_step_5", "{run_nowhere} does not say where it was made"),
    ("merge {run_no_ranks}/checkpoints/global_step_5", "fsdp_config.json:1: lacks world_size"),
    (
        "merge {run_lost_rank}/checkpoints/global_step_5",
        "model_world_size_2_rank_0.pt, model_world_size_2_rank_1.pt miss",
    ),
    ("merge {run_ranks}/checkpoints/global_step_5", "its config.yaml, manifest.json or reports are damaged"),
    ("merge Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B does not exist"),
    ("plot", "the following arguments are required: RUN"),
    ("plot {none}", "{none} is not a run folder"),
    ("plot {folder}", "{folder} is not a run folder"),
    ("plot {file}", "{file} is not a run folder"),
    ("plot {run_latin}", "{run_latin}/metrics.jsonl:1: is damaged (not text)"),
    ("plot {run_inner}", "metrics.jsonl:1: is damaged"),
    ("plot {run_list}", "metrics.jsonl:1: is damaged (no JSON object)"),
    ("plot {run_no_step}", "metrics.jsonl:1: names no step"),
    ("plot {run_plots_file}", "File exists: {run_plots_file}/plots"),
    ("plot {run_yaml}", "config.yaml:2: is damaged"),
    ("plot {run_empty_config}", "config.yaml:1: is empty"),
    ("plot {run_list_config}", "config.yaml:1: lacks actor_rollout_ref, data"),
    ("plot {run_no_nodes}", "config.yaml:1: lacks actor_rollout_ref, data"),
    ("plot {run_bad_dump}", "minibatch0.pt is damaged"),
    ("bench --rounds abc", "argument --rounds"),
    ("bench --rounds 1", "--rounds must be 2 or more"),
    ("bench --vocabulary 0", "argument --vocabulary: must be a whole number, 1 or more"),
    ("bench --against nothing", "invalid choice: 'nothing'"),
    ("bench --write", "--write renews the ratios of --quick"),
    ("bench --quick method=cppo", "--costs, --quick and --schedule take no settings"),
    ("bench --quick --costs x", "not allowed with argument"),
    ("bench =3", "'=3' is no setting"),
    ("doctor =3", "'=3' is no setting"),
    ("doctor method=ppo", "method=ppo: there is no such method"),
    ("doctor --jsonn", "unrecognized arguments: --jsonn"),
    ("", "the following arguments are required: COMMAND"),
    ("trian", "invalid choice: 'trian'"),
]
# Refused before the configuration is composed.
WORDS = [
    ("train =3", "'=3' is no setting: give NAME=VALUE"),
    ("train 3", "'3' is no setting"),
    ("train {file}", "is no setting"),
    ("train method", "'method' is no setting"),
    ("train +", "'+' is no setting"),
    ("train ~", "'~' is no setting"),
    ("train ~=1", "'~=1' is no setting"),
    ("train a=b=c", "a=b=c: "),
    ("train run.dump_steps=[", "run.dump_steps=[: "),
    ("train run.name=$(x)", "run.name=$(x): "),
    ("train run.name=~x", "run.name=~x: "),
    ("train +trainer.x={a", "+trainer.x={a: "),
    ("train run.name='x", "run.name='x: "),
    ("train method=", "method=: there is no such method"),
    ("train method=ppo", "method=ppo: there is no such method; choose one of aspo"),
    ("train method=[cppo,dppo]", "there is no such method"),
    ("train recipe=none", "recipe=none: there is no such recipe; choose one of paper"),
    ("train platform=tpu", "platform=tpu: there is no such platform; choose one of cpu, gpu"),
    ("train divergence=js", "divergence=js: there is no such divergence"),
    ("train run=3", "run=3: it holds settings; give them as run.NAME=VALUE"),
    ("train reward=null", "reward=null: it holds settings"),
    ("train hydra=3", "hydra=3: Hydra's own settings decide nothing here"),
    ("train hydra.run.dir=/x", "Hydra's own settings decide nothing here"),
    ("train --dry-run --dry-walk", "unrecognized arguments: --dry-walk"),
    ("train --unknown", "unrecognized arguments: --unknown"),
    (f"train {LONG}", "is no setting"),
]
# Composed, on top of a run that would work.
TRAIN = [
    (["foo.bar=1"], "foo.bar: there is no such setting"),
    (["run.seed=${nope}"], "Interpolation key 'nope' not found"),
    (["run.name='a\x1b[31m[/x]'"], "run.name=a\\x1b[31m[/x]: a plain folder name"),
    (["run.dir={file}"], "run.dir={file} is a file: give a folder"),
    (["data.train_files=[3]"], "data.train_files=3: give a parquet file"),
    (["data.train_files={empty_prompt.parquet}", "data.train_batch_size=8"], "has no prompt in rows 3 and 4 of 4"),
    (["data.val_files={null_gold.parquet}"], "has no reward_model.ground_truth in rows 2 and 4 of 4"),
    (["data.val_files={many_nulls.parquet}"], "in 20000 of 20000 rows, the first are 1, 2 and 3"),
    (["actor_rollout_ref.model.path={model_corrupt}"], "its config.json cannot be read"),
    (["actor_rollout_ref.model.path={model_no_weights}"], "has no weights"),
    (["actor_rollout_ref.rollout.max_model_len=10"], "max_model_len=10 holds neither a prompt of 24 tokens"),
    (["trainer.logger=[console,mlflow]"], "trainer.logger has mlflow, but the package mlflow is not installed"),
]
# The same, of the slow tests.
TRAIN_MORE = [
    (["trainer=3"], "trainer=3: it holds settings"),
    (["~trainer"], "trainer=None: it holds settings"),
    (["actor_rollout_ref.rollout=null"], "actor_rollout_ref.rollout=None: it holds settings"),
    (["~run.seed"], "Interpolation key 'run.seed' not found"),
    (["run.name=${run.name}"], "Recursive interpolation"),
    (["run.name=[a]"], "run.name=['a']: give text"),
    ([f"run.name={LONG}"], "a plain folder name is needed, of 200 bytes at most"),
    (["data.train_files=3"], "data.train_files=3: give a parquet file or a list of them"),
    (["data.val_files={null_content.parquet}"], "has a message without content in its prompt in row 4 of 4"),
    (["data.val_files={null_source.parquet}"], "has no data_source in row 2 of 4"),
    (["data.val_files={no_rows.parquet}"], "is empty"),
    (["data.val_files={folder}"], "is a folder"),
    (["data.val_files={file}"], "is none of .parquet"),
    (["actor_rollout_ref.model.path={model_deep_config}"], "its config.json cannot be read"),
    (["actor_rollout_ref.model.path={model_list_config}"], "its config.json names no model_type"),
    (["actor_rollout_ref.model.path={model_no_type}"], "its config.json names no model_type"),
    (["actor_rollout_ref.model.path={file}"], "actor_rollout_ref.model.path={file} does not exist"),
    (["method._target_=os.system"], "method._target_=os.system cannot be imported"),
    (["reward.custom_reward_function.path={zeros.jsonl}"], "is not Python"),
    (["reward.custom_reward_function.path={folder}"], "does not exist"),
]


def filled(text, place):
    """{name} is that file of the folder, there or not; OUT one that is not there."""
    return re.sub(r"(?<!\$)\{([\w.]+)\}", lambda found: str(place / found[1]), text).replace("OUT", str(place / "out"))


def refused(command, expected, place, capsys):
    status, _, lines = run(command, capsys)
    assert status == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("cppo")
    assert filled(expected, place) in lines[0]
    assert visible(lines[0])
    assert len(lines[0]) < 1500


@pytest.mark.parametrize(("command", "expected"), [*PREPARE, *REPORT, *EVAL, *OTHERS, *WORDS], ids=str)
def test_refused_in_one_line(command, expected, place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused([filled(word, place) for word in command.split()], expected, place, capsys)


def of_a_run(place, *overrides):
    assets = place / "assets"
    return ["train", "platform=cpu", "recipe=quickstart", f"quickstart.assets={assets}", f"run.dir={place}/runs",
            "run.name=new", *(filled(text, place) for text in overrides)]  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), TRAIN, ids=str)
def test_a_run_is_refused_in_one_line(overrides, expected, place, capsys):
    refused(of_a_run(place, *overrides), expected, place, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "expected"), TRAIN_MORE, ids=str)
def test_more_runs_are_refused_in_one_line(overrides, expected, place, capsys):
    refused(of_a_run(place, *overrides), expected, place, capsys)


def test_every_wrong_setting_of_a_command_has_its_line(place, capsys):
    """As a person gives them: through Hydra's grammar."""
    wrong = {
        "actor_rollout_ref.actor.optim.lr": "nan",
        "actor_rollout_ref.actor.optim.clip_grad": "-1",
        "actor_rollout_ref.rollout.temperature": "0",
        "actor_rollout_ref.rollout.val_kwargs.n": "0",
        "algorithm.rollout_correction.rollout_rs": "token_k1",
        "data.max_response_length": "0",
        "method.delta": "inf",
        "ray_kwargs.ray_init.num_cpus": "0",
        "run.dump_steps": "abc",
        "run.poll_interval": "abc",
        "run.seed": "-1",
        "trainer.device": "tpu",
        "trainer.logger": "foo",
    }
    status, _, lines = run(of_a_run(place, *(f"{key}={value}" for key, value in wrong.items())), capsys)
    assert status == 2
    assert {line.removeprefix("cppo train: ").partition("=")[0] for line in lines} == set(wrong)
    assert len(lines) == len(wrong)


@pytest.fixture(scope="module")
def good(place):
    return compose(of_a_run(place)[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values], ids=str)
def test_every_wrong_setting_alone(key, value, good):
    """One line each, whatever is computed from it."""
    config = copy.deepcopy(good)
    OmegaConf.update(config, key, value, force_add=True)
    with pytest.raises(ConfigError) as refusal:
        validate(config)
    lines = [problem.text for problem in refusal.value.problems]
    assert lines[0].startswith(f"{key}=")
    assert len(lines) == 1 or key == "thresholds.tv.delta"


WORKS = [
    "report {eval_good}",
    "report {eval_cut}",
    "plot {run_good}",
    "plot {run_no_metrics}",
    "plot {run_text_values}",
    "prepare --out {folder} --train a={good.jsonl} --eval",
    "prepare --out {folder} --train a={foreign_digits.jsonl} --eval",
    "prepare --out {folder} --train --eval a={good.jsonl}",
    "prepare --out {folder} --train d={escape.jsonl} --eval",
    "--help",
    "--version",
    "eval --help",
]


@pytest.mark.parametrize("command", WORKS)
def test_odd_but_right(command, place, capsys):
    status, output, lines = run([filled(word, place) for word in command.split()], capsys)
    assert not status, lines
    assert output
    assert visible(output)


def test_what_a_set_lost_is_named_without_its_escape_sequences(place, capsys):
    command = "prepare --out {folder} --train b={good.jsonl} --eval c={escape.jsonl}"
    status, output, lines = run([filled(word, place) for word in command.split()], capsys)
    assert (status, len(lines)) == (2, 1)  # nothing is left of b
    assert visible(output)


def test_a_dry_run_of_a_good_configuration(place, capsys):
    status, output, lines = run([*of_a_run(place), "--dry-run"], capsys)
    assert status == 0
    assert lines[-1].endswith("nothing was started")
    assert "actor_rollout_ref:" in output


def test_planning_needs_neither_weights_nor_data(place, capsys):
    command = of_a_run(place, "actor_rollout_ref.model.path={model_no_weights}", "data.train_files=none.parquet")
    status, _, lines = run([*command, "--dry-run"], capsys)
    assert status == 0
    assert sum("not on this machine" in line for line in lines) == 2
