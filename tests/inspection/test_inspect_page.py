"""The page of ``cppo inspect`` in headless Chromium: what it shows, keys, hostile text, time."""

import json

import chromium
import pytest
import torch
from inspected_run import CPPO, WORDS, make_run

from cppo_verl.cli import main

pytestmark = pytest.mark.skipif(chromium.NAME is None, reason="no Chromium here: apt-get install chromium")

HOSTILE = [
    "<script>window.hacked = 1</script>", "</script><script>window.hacked = 1</script>", "<img src=x onerror=hacked=1>",
    "<!--", "<b>bold</b>", "%%data%%", "\u202eright to left", "שלום", "مرحبا", "a\u200bb", "\x1b[31m", "\"'&lt;", "]]>",
    "javascript:hacked=1", "${hacked=1}", "\n", "{{x}}", "<svg onload=hacked=1>", "\u2028", " ",
]  # fmt: skip


def page_of(run, *arguments):
    assert main(["inspect", str(run), *arguments]) == 0
    return run / "inspect.html"


@pytest.fixture(scope="module")
def browser():
    with chromium.browser() as opened:
        opened.size(1280, 800)
        yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("inspected") / "a run", steps=(2, 10))


@pytest.fixture
def shown(browser, run):
    browser.messages.clear()
    browser.requests.clear()
    browser.open(page_of(run))
    yield browser
    assert browser.messages == []


def text(browser, place):
    return browser.run(f"document.querySelector({place!r}).textContent")


def choose(browser, control, value):
    browser.run(f"$('{control}').value = {json.dumps(value)}; $('{control}').dispatchEvent(new Event('change'))")
    browser.run("new Promise(requestAnimationFrame)")
    assert browser.run(f"$('{control}').value") == value


def dumped(run, step=2):
    files = sorted((run / f"dumps/step_{step}").glob("*.pt"))
    return [torch.load(file) for file in files]


def test_nothing_is_fetched_and_the_mask_is_trainings(shown, run):
    assert [url.split(":")[0] for url in shown.requests] == ["file"]
    tokens = sum(int(dump["response_mask"].sum()) for dump in dumped(run))
    assert text(shown, "#parity") == f"✓ the mask computed here is training's on all {tokens} tokens"
    masked = sum(int((dump["response_mask"] & (dump["gate"] < 1)).sum()) for dump in dumped(run))
    assert masked > 20
    assert f"in training {masked / tokens:.2%}" in text(shown, "#effect")
    assert text(shown, "#effect").startswith(f"masked {masked / tokens:.2%} ")


def test_a_mask_that_is_not_the_methods_is_said(browser, tmp_path):
    run = make_run(tmp_path / "tampered")
    file = next((run / "dumps/step_1").glob("minibatch0*"))
    dump = torch.load(file)
    dump["gate"][3, 5] = 1 - dump["gate"][3, 5]
    torch.save(dump, file)
    browser.open(page_of(run))
    assert "differs from training's mask on 1 of" in text(browser, "#parity")
    assert "first at response 4, token 6" in text(browser, "#parity")


def test_sliders_methods_and_two_side_by_side(shown):
    before = text(shown, "#effect")
    shown.run("input = document.querySelector('#sliders [type=number]'); input.value = 1e-6;"
              "input.dispatchEvent(new Event('input')); new Promise(requestAnimationFrame)")  # fmt: skip
    assert text(shown, "#effect") != before
    assert float(text(shown, "#effect").split()[1].rstrip("%")) > 30
    choose(shown, "other", "training's mask")
    differing = "row.mask.gate.reduce((sum, gate, t) => sum + (gate !== row.gate[t]), 0)"
    shown.run(f"open(state.step.rows.find((row) => {differing} > 0))")
    assert shown.run("document.querySelectorAll('.reader .x').length") == 2 * shown.run(
        f"(() => {{ const {{ row }} = state; return {differing}; }})()"
    )
    shown.run("$('reset').click()")
    assert text(shown, "#effect") == before
    assert shown.run("document.querySelectorAll('.reader .x').length") == 0
    for name in ("trm_max", "grpo", "cispo", "dppo"):
        choose(shown, "method", name)
        choose(shown, "other", "cppo")
        assert text(shown, ".reader h2").startswith(name)
    assert "masked 0.00%" not in text(shown, "#effect")


def test_filters_search_and_order(shown, run):
    rows = [(dump, row) for dump in dumped(run) for row in range(len(dump["gate"]))]

    def masked(dump, row, token):
        cause = dump["token_cause"][row] if token else ~dump["token_cause"][row]
        return bool((dump["response_mask"][row] & (dump["gate"][row] < 1) & cause).any())

    wanted = {
        "masked by token": sum(masked(dump, row, True) for dump, row in rows),
        "masked by prefix": sum(masked(dump, row, False) for dump, row in rows),
        "right": sum(bool(dump["advantages"][row, 0] > 0) for dump, row in rows),
        "wrong": sum(bool(dump["advantages"][row, 0] < 0) for dump, row in rows),
    }
    assert 0 < wanted["masked by token"] < 16
    for name, count in wanted.items():
        choose(shown, "filter", name)
        assert text(shown, "#count") == f"{count} of 16 responses"
    choose(shown, "filter", "all")
    choose(shown, "sort", "drift S")
    drift = shown.run("state.shown.map((row) => row.about.drift)")
    assert drift == sorted(drift, reverse=True)
    word = WORDS[int(dumped(run)[0]["responses"][2, 0])].strip()
    shown.run(f"$('query').value = '{word.upper()}'; $('query').dispatchEvent(new Event('input'))")
    assert 0 < shown.run("state.shown.length") < 16
    shown.run("open(state.shown.find((row) => rowText(row).includes('" + word + "')))")
    assert word in text(shown, ".tokens .hit")


def test_keys(shown):
    shown.run("choose(0)")
    shown.key("ArrowRight")
    assert shown.run("state.at") == 1
    shown.key("ArrowLeft")
    shown.key("ArrowLeft")
    assert shown.run("state.at") == 0
    shown.key("W")
    worst = shown.run("[state.row.about.highest, Math.max(...state.step.rows.map((row) => row.about.highest))]")
    assert worst[0] == worst[1] > 1
    assert shown.run("state.row.mask.excess[state.at]") == worst[0]
    shown.run("state.at = -1")
    shown.key("n")
    assert shown.run("[BY_TOKEN, BY_PREFIX].includes(state.row.mask.cause[state.at])")
    first = shown.run("state.row.index")
    shown.key("j")
    assert shown.run("state.row.index") != first
    shown.key("c")
    assert shown.run("$('colour').value") == "divergence"
    shown.key("/")
    assert shown.run("document.activeElement.id") == "query"
    shown.key("W")
    assert shown.run("$('query').value") == "W"  # typed, not obeyed


def test_a_token_has_its_numbers_and_bars(shown, run):
    dump, t = dumped(run)[0], 7
    shown.run(f"open(state.step.rows[0], {t})")
    cells = shown.run("[...document.querySelectorAll('#detail td')].map((cell) => cell.textContent)")
    pi, mu = dump["log_prob"][0, t].exp().item(), dump["rollout_log_prob"][0, t].exp().item()
    assert [float(cell) for cell in cells[:2]] == pytest.approx([pi, mu], rel=1e-3)
    assert float(cells[4]) == pytest.approx(dump["divergence"][0, t].item(), rel=1e-3)
    both = torch.maximum(dump["topk_log_prob"][0, t], dump["rollout_topk_log_prob"][0, t]).exp()
    assert shown.run("document.querySelectorAll('#detail .pair').length") == int((both >= 1e-3).sum())
    widths = shown.run("[...document.querySelectorAll('#detail .of-mu')].map((bar) => parseFloat(bar.style.width))")
    expected = 100 * dump["rollout_topk_log_prob"][0, t].exp()[both >= 1e-3]
    assert sorted(widths) == pytest.approx(sorted(expected.tolist()), abs=0.002)
    assert WORDS[int(dump["responses"][0, t])].strip() in text(shown, "#detail .sampled")


def test_another_step(shown, run):
    choose(shown, "step", "10")
    shown.run("new Promise(done => setTimeout(done, 300))")
    tokens = sum(int(dump["response_mask"].sum()) for dump in dumped(run, 10))
    assert text(shown, "#parity").endswith(f"all {tokens} tokens")


def test_hostile_text_is_text(browser, tmp_path):
    run = make_run(tmp_path / "<img src=x onerror=hacked=1>", words=[WORDS[0], *HOSTILE], rows=16)
    browser.messages.clear()
    browser.open(page_of(run))
    for row in range(16):
        browser.run(f"open(state.step.rows[{row}])")
    shown = browser.run("document.body.innerText")
    for word in (
        "<script>window.hacked = 1</script>",
        "<img src=x onerror=hacked=1>",
        "\\u202eright to left",
        "\\x1b[31m",
    ):
        assert word in shown
    assert "\u202e" not in shown
    assert browser.run("typeof hacked") == "undefined"
    assert browser.run("document.querySelectorAll('img, svg, b, iframe, object').length") == 0
    assert browser.run("document.scripts.length") == 3  # data, one step, ours
    assert (
        browser.run(
            "[...document.querySelectorAll('.tokens span')].filter((s) => /[\u0590-\u06ff]/.test(s.textContent)).length"
        )
        == 0
    )
    assert browser.run("document.querySelectorAll('.tokens bdi').length") > 0
    assert browser.messages == []


def test_what_is_put_into_the_page_cannot_run(browser, tmp_path):
    """The page's own policy: shown by markup that a mistake would have let in."""
    run = make_run(tmp_path / "policy")
    page = page_of(run)
    planted = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></main>"
    page.write_text(page.read_text().replace("</main>", planted))
    browser.open(page)
    assert browser.run("typeof hacked") == "undefined"
    page.write_text(page.read_text().replace("script-src ", "script-src 'unsafe-inline' ").replace("'sha256-", "'"))
    browser.call("Page.navigate", url=page.resolve().as_uri())
    assert browser.run("new Promise(done => setTimeout(() => done(typeof hacked), 500))") == "number"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_screen_and_text_can_be_read(browser, run, width, dark):
    browser.size(width, 800, dark=dark)
    browser.open(page_of(run))
    choose(browser, "other", "dppo")
    assert browser.run("document.documentElement.scrollWidth") <= width
    paper, ink = browser.run(
        "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"
    )
    assert (sum(paper) < sum(ink)) == dark
    assert abs(sum(paper) - sum(ink)) > 450
    browser.size(1280, 800)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("rows", "length", "method"),
    [
        pytest.param(200, 500, CPPO, id="200 responses of up to 500 tokens"),
        pytest.param(200, 500, CPPO | {"delta_b_quantile": 0.9}, id="the same, calibrated"),
        pytest.param(8, 16_000, CPPO, id="8 responses of up to 16,000 tokens"),
    ],
)
def test_time(tmp_path, rows, length, method):
    """The best of three loads, scrolls and openings and of five slides: what others do on the machine is not ours.

    ``-s`` prints all of them.
    """
    run = make_run(tmp_path / "run", rows=rows, length=length, method=method)
    page = page_of(run)
    with chromium.browser() as browser:
        measured = chromium.times(browser, page)
        assert "is training's on all" in text(browser, "#parity")
    print(f"\n{rows} x {length}: {page.stat().st_size / 2**20:.1f} MiB")
    print(chromium.table(measured))
    assert [name for name, (times, limit) in measured.items() if min(times) >= limit] == []
