"""What documents name is there: tests, files, links and their anchors, identifiers; and the site builds."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "tests" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# What commands of the documents write.
MADE_BY_USERS = ("configs/method/running_max.yaml", "data/manifest.json")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

# [text](target) or ![text](target), targets inside the checkout.
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:)([^)\s]*)\)")
# `tests/core/test_x.py::test_y`, with or without the folder tests/.
TEST = re.compile(r"`(?:tests/)?([\w/]+\.py)::(\w+)`")
# `folder/file.py` and the like, in text.
FILE = re.compile(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|yaml|sh|md|json|txt|lock|toml))`")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """As GitHub makes them of headings, and those set by hand."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings)
    named = re.findall(r'<a id="([^"]+)">', text)
    return {*named, *(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain)}


def dead_links(page, text):
    for _, target in LINK.findall(without_code(text)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve()
        if (path and not file.exists()) or (anchor and anchor not in anchors(file.read_text() if path else text)):
            yield target


def functions(file):
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def absent_tests(text):
    for file, name in TEST.findall(without_code(text)):
        path = ROOT / "tests" / file
        if not path.is_file() or name not in functions(path):
            yield f"{file}::{name}"


def absent_files(page, text):
    """Files of the checkout, named from its root, the package, tests/ or the page's own folder."""
    roots = (ROOT, ROOT / "cppo_verl", ROOT / "tests", page.parent)
    for name in FILE.findall(without_code(text)):
        known = any((root / name.split("/")[0]).is_dir() for root in roots)
        if known and name not in MADE_BY_USERS and not any((root / name).exists() for root in roots):
            yield name


def absent_names(page, text):
    """Identifiers that stand as the text of a link to a Python file."""
    for shown, target in LINK.findall(without_code(text)):
        file = (page.parent / target).resolve()
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", shown) if target.endswith(".py") and file.is_file() else ():
            if not name.endswith(".py") and not re.search(rf"\b{name.rpartition('.')[2]}\b", file.read_text()):
                yield f"{name} in {target}"


@pages
def test_links_lead_somewhere(page):
    assert list(dead_links(page, page.read_text())) == []


@pages
def test_named_tests_files_and_functions_exist(page):
    text = page.read_text()
    assert list(absent_tests(text)) == []
    assert list(absent_files(page, text)) == []
    assert list(absent_names(page, text)) == []


def test_equations_name_tests_at_all():
    assert len(TEST.findall((ROOT / "docs" / "equations.md").read_text())) > 80


def test_the_checks_can_fail():
    page = ROOT / "docs" / "planted.md"
    there = "core/test_core_masks.py::test_cppo_mask_matches_the_slow_loop"
    text = (
        "# A page\n[a](nowhere.md) [b](#a-page) [c](#another) [d](metrics.md#metrics) [e](metrics.md#nothing)\n"
        f"`core/test_core_masks.py::test_no_such` `{there}` `core/masks.py` `core/gone.py`\n"
        "[`cppo_mask`, `gone`](../cppo_verl/core/masks.py)\n```\n[f](code.md)\n```\n"
    )
    assert list(dead_links(page, text)) == ["nowhere.md", "#another", "metrics.md#nothing"]
    assert list(absent_tests(text)) == ["core/test_core_masks.py::test_no_such"]
    assert list(absent_files(page, text)) == ["core/gone.py"]
    assert list(absent_names(page, text)) == ["gone in ../cppo_verl/core/masks.py"]


def test_the_readme_is_short():
    """Three minutes at 300 words a minute."""
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_core_leads_to_its_equations():
    import cppo_verl.core

    assert "docs/equations.md" in cppo_verl.core.__doc__
    assert (ROOT / "docs" / "equations.md").is_file()


def site(checkout, folder):
    mkdocs = Path(sys.executable).with_name("mkdocs")
    return subprocess.run(
        [mkdocs, "build", "-f", checkout / ".mkdocs.yml", "-d", folder], capture_output=True, text=True
    )


def test_the_site_builds_and_a_broken_link_stops_it(tmp_path):
    done = site(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "cppo_mask" in (tmp_path / "site/source/cppo_verl/core/masks.py/index.html").read_text()
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(".venv", ".git", "runs", "site", "*cache*", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignore)
    page = copy / "docs" / "metrics.md"
    for broken in ("[x](nowhere.md)", "[x](design.md#nowhere)", "[x](../cppo_verl/nowhere.py)"):
        page.write_text(f"# Metrics\n\n{broken}\n")
        stopped = site(copy, tmp_path / "other")
        assert stopped.returncode != 0, broken
        assert "nowhere" in stopped.stderr
