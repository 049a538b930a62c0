# ruff: noqa: PT017, RUF001
"""Whatever goes in: the core, the grader, `cppo prepare` and the configuration answer, or refuse in words of their own.

The same examples every time; the slow test takes others.
"""

import json
import math
import unicodedata

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cppo_verl import core
from cppo_verl.config.compose import compose
from cppo_verl.config.schema import RULES, shown
from cppo_verl.config.validate import validate
from cppo_verl.data.prepare import Request, prepare
from cppo_verl.grading import OUTCOMES, grade
from cppo_verl.grading.extract import final_answer
from cppo_verl.grading.normalize import clean
from cppo_verl.problems import ConfigError
from cppo_verl.run.terminal import one_line

QUIET = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3e38, -1e30, 1.0])
NUMBERS = st.one_of(st.floats(-30, 30, width=32), ODD)


@st.composite
def batches(draw, elements):
    """(log ratio, advantages, divergence, mask), each [B, T]; the divergence is not negative."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    size = rows * length

    def tensor(values):
        return torch.tensor(draw(st.lists(values, min_size=size, max_size=size))).reshape(rows, length)

    mask = tensor(st.booleans())
    return tensor(elements), tensor(elements), tensor(elements).abs(), mask


@QUIET
@given(batches(NUMBERS), NUMBERS, st.one_of(st.none(), st.floats(0, 10)))
def test_a_mask_of_anything(batch, delta, budget):
    """A decision for every token, or an error that names an argument; what moves back to the rollout is kept."""
    log_ratio, advantages, divergence, mask = batch
    weights = core.position_weights(mask, 0.8)
    delta_b = None if budget is None else torch.full((len(mask),), budget)
    try:
        region = core.cppo_mask(log_ratio, advantages, divergence, mask, delta=delta, weights=weights, delta_b=delta_b)
    except ValueError as error:
        assert str(error).split()[0] in ("delta", "log_ratio", "advantages", "divergence", "weights", "delta_b")
        return
    assert region.keep.dtype == torch.bool
    assert not (region.keep & ~mask).any()
    back = mask & (advantages * log_ratio <= 0)
    assert (region.keep | ~back).all()
    assert not torch.isnan(region.threshold).any()
    assert not torch.isnan(region.excess).any()


@QUIET
@given(batches(st.floats(-5, 5, width=32)), st.floats(0.01, 2), st.floats(0, 1), st.integers(1, 4))
def test_padding_decides_nothing(batch, delta, budget, more):
    log_ratio, advantages, divergence, _ = batch

    def kept(width):
        padded = [torch.nn.functional.pad(part, (0, width), value=7.0) for part in (log_ratio, advantages, divergence)]
        mask = torch.nn.functional.pad(torch.ones_like(log_ratio, dtype=torch.bool), (0, width))
        weights = core.position_weights(mask, 0.8)
        region = core.cppo_mask(*padded, mask, delta=delta, weights=weights, delta_b=torch.full((len(mask),), budget))
        return region.keep[:, : log_ratio.shape[1]]

    assert torch.equal(kept(0), kept(more))


PIECES = st.sampled_from(
    [*r"0123456789{}[]()^_!%$\,.;:=<>+-*/|&~#'\" " + "\n\t٣３²½π°\u202e\x00\x1b", r"\boxed{", r"\fbox{", r"\frac{1}{2}",
     r"\text{", r"\{", r"\}", r"\sqrt", "percent", "</think>", "Answer:", "Answer: 5", r"\pi", " and ", "x", "cm",
     r"\circ"]
)  # fmt: skip
ANSWERS = st.one_of(st.lists(PIECES, max_size=30).map("".join), st.text(max_size=60))


@pytest.fixture
def no_algebra(monkeypatch):
    """What reaches the worker is the worker's: it may take its seconds there."""
    monkeypatch.setattr("cppo_verl.grading.grader.ask", lambda question, timeout: {"right": False})


@settings(QUIET, max_examples=150)
@given(ANSWERS, ANSWERS, st.booleans())
@example("\\boxed{" * 30, "\\boxed{", True)
@example("9" * 5000, "9" * 5000, False)
def test_a_response_and_a_gold_of_anything_have_an_outcome(no_algebra, answer, gold, line):
    for response in (answer, rf"\boxed{{{answer}}}", f"Answer: {answer}"):
        verdict = grade(response, gold, answer_line=line)
        assert verdict.outcome in OUTCOMES
        assert verdict.answer is None or verdict.answer in response
    once = clean(answer)
    assert len(once) <= 2 * len(answer) + 20


@QUIET
@given(st.integers(-(10**12), 10**12), st.integers(-5, 5))
def test_an_integer_is_right_exactly_where_it_is_the_gold(no_algebra, gold, off):
    spelled = [f"{gold + off}", f"{gold + off:,}", f" {gold + off}.0 ", f"\\text{{{gold + off}}}", f"{gold + off} cm"]
    for text in spelled:
        assert (grade(rf"\boxed{{{text}}}", str(gold)).outcome == "right") == (off == 0), text


@QUIET
@given(ANSWERS)
def test_an_unclosed_box_has_no_answer(text):
    opened = text.replace("}", "").replace("\\boxed{", "").replace("\\fbox{", "").replace("\\", "")
    assert final_answer(rf"\boxed{{{opened}") is None


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["problem", "question", "prompt", "answer", "solution", "ground_truth", "reward_model", "id"])
ROWS = st.lists(st.one_of(st.dictionaries(COLUMNS, JSON, max_size=4), JSON), min_size=1, max_size=4)


@QUIET
@given(st.one_of(ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()), st.binary(max_size=60)))
@example(b'{"problem": "\\ud800", "answer": "1"}')
@example(b"[" * 100_000)
def test_a_file_of_anything_is_prepared_or_refused(tmp_path, content):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    try:
        manifest = prepare([Request("rows", str(file))], [], tmp_path / "out", "boxed")
    except ConfigError as error:
        assert str(error).startswith("rows: ")
        assert len(one_line(str(error))) < 1000
    else:
        assert manifest["sets"]["rows"]["kept"] > 0


WORDS = st.one_of(
    st.text(max_size=12),
    st.tuples(
        st.sampled_from(["", "+", "++", "~"]),
        st.sampled_from([*RULES, "method", "run", "hydra", "recipe", "platform", "divergence.k", "nope", "trainer"]),
        st.sampled_from(["", "="]),
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(["null", "true", "-1", "0", "nan", "inf", "[]", "[1,a]", "{a:1}", "${x}", "${run.seed}"]),
            st.sampled_from(["???", "''"]),
        ),
    ).map("".join),
)  # fmt: skip


def composed_or_refused(words):
    try:
        validate(compose(["platform=cpu", *words]), planned=True)
    except ConfigError as error:
        lines = [problem.text for problem in error.problems] or str(error).split("\n")
        assert all(map(visible, "".join(map(one_line, lines))))


def visible(character):
    """Nothing that a terminal obeys; spaces of any width are not "printable" in Python's sense."""
    return character.isprintable() or character == "\t" or unicodedata.category(character) == "Zs"


@settings(QUIET, max_examples=8)
@given(st.lists(WORDS, min_size=1, max_size=3))
def test_overrides_of_anything_are_composed_or_refused(words):
    composed_or_refused(words)


@pytest.mark.slow
@settings(QUIET, max_examples=200, derandomize=False)
@example(["\xa0"])
@given(st.lists(WORDS, min_size=1, max_size=3))
def test_more_overrides_are_composed_or_refused(words):
    composed_or_refused(words)


@settings(QUIET, max_examples=300)
@given(st.one_of(JSON, st.integers(), st.floats(), st.text()))
def test_a_setting_of_any_value_fits_its_row_or_not(value):
    for rule in RULES.values():
        assert rule.accepts(value) in (True, False)
    assert len(shown(value)) < 120
