"""Text from outside is text on the terminal: no markup, no escape sequence, no control character."""

import ast
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from run_folders import config_of

import cppo_verl
from cppo_verl import cli
from cppo_verl.evaluation.display import SamplingDisplay
from cppo_verl.run.failure import Failure
from cppo_verl.run.terminal import console, one_line, plain, say
from cppo_verl.training import display

HOSTILE = {
    "closing tag": "[/x]",
    "colour": "[red]a[/red]",
    "link": "[link=http://x]a[/link]",
    "emoji code": ":smile:",
    "escape sequence": "\x1b[31ma\x1b[0m",
    "title": "\x1b]0;a\x07",
    "bell": "a\x07",
    "carriage return": "a\rb",
    "backspace": "a\x08\x08",
    "C1": "a\x9b31m",
    "bidi override": "a\u202eb\u2066c",
    "line separator": "a\u2028b",
    "lone surrogate": "a\ud800b",
    "zero width": "a\u200bb",
}
hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())


def harmless(output):
    return all(character.isprintable() or character in "\n\t" for character in output)


@hostile
def test_shown_as_it_is_written(text, capsys):
    shown = plain(text)
    assert harmless(shown)
    assert shown.encode().decode("unicode_escape") == text or text.isprintable()
    say(f"name {text}")
    assert capsys.readouterr().out == f"name {shown}\n"


def test_ordinary_text_is_left_alone():
    for text in ("a b", "é ü 数学\u3000x\u00a0y", "two\nlines\tand a tab", "[0, 1)", "٣"):
        assert plain(text) == text
    assert one_line("two\nlines") == "two\\nlines"


@hostile
@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_shows_it_too_wherever_it_stands(text, terminal):
    """rich's own would refuse the first and obey the others; a terminal's own colours are not among them."""
    output = io.StringIO()
    ours = console(file=output, force_terminal=terminal, no_color=True, width=200)
    table = Table(title=text, box=None)
    table.add_column(text)
    table.add_row(text)
    ours.print(text, f"name {text}")
    ours.print(table)
    assert output.getvalue().count(plain(text)) >= 4
    assert text.isprintable() or text not in output.getvalue()


def test_the_check_can_fail():
    output = io.StringIO()
    Console(file=output).print("\x1b[31ma")
    assert not harmless(output.getvalue())


@hostile
def test_a_run_with_such_a_data_source(text, tmp_path, monkeypatch):
    """Steps, phases, the failure and the summary; the plots, in whose labels a dollar sign begins a formula."""
    output = io.StringIO()
    monkeypatch.setattr(display, "console", lambda: console(file=output, width=200))
    log = tmp_path / "log"
    log.write_text(f"ValueError: {text.replace(chr(10), '')}\n", errors="replace")
    lines = [{"step": step, f"val-core/{text}$\\frac/acc/mean@4": 0.5, "training/global_step": step} for step in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text(config_of(tmp_path))
    with display.RunDisplay(tmp_path, log) as shown:
        shown.event({"event": "initialized", "total_steps": 1, "step": 0})
        for line in lines:
            shown.line(line)
        shown.event({"event": "failed", "error": text, "message": f"{text}\n{text}"})
    shown.failure(1)
    shown.summary() if text == "[/x]" else None
    assert harmless(output.getvalue())
    assert plain(text) in output.getvalue()


@hostile
def test_an_evaluation_with_such_an_event(text, tmp_path):
    class Asked:
        n, questions, samples, folder = 1, [1], {}, tmp_path / "e"

    output = io.StringIO()
    with SamplingDisplay(Asked(), tmp_path / "log", console(file=output, width=200)) as shown:
        shown.event({"event": text})
    assert harmless(output.getvalue())


def test_the_end_of_a_log(tmp_path):
    output, log = io.StringIO(), tmp_path / "log"
    log.write_bytes(b"\x1b[31m[/x]\x07\xff\n" * 3)
    Failure(log).show(console(file=output), "the run", 1)
    assert harmless(output.getvalue())
    assert "[/x]" in output.getvalue()


def test_an_error_of_the_command(capsys):
    assert cli.main(["merge", "no such\x1b[31m[/x]"]) == 2
    assert capsys.readouterr().err.startswith("cppo merge: no such\\x1b[31m[/x] does not exist")


def test_nothing_prints_past_the_one_place():
    """Rooms of the command line; what prints a file to be read again says so."""
    root = Path(cppo_verl.__file__).parent
    files = [root / "cli.py"]
    rooms = "run checkpoint data config dry_run evaluation figures training inspection doctor"
    for room in rooms.split():
        files += (root / room).glob("*.py")
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console"):
                found.append(f"{path.parent.name}/{path.name}")
    assert sorted(found) == ["run/terminal.py", "training/command.py"]
