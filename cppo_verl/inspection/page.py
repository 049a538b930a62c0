"""One HTML file that holds everything: no network, and nothing in it runs but the page's own script."""

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from cppo_verl.inspection.rows import SMALLEST, UNIT, Step

_WEB = files("cppo_verl.inspection") / "web"
SCRIPTS = ("mask.js", "data.js", "view.js", "list.js", "app.js")
# Columns of 4 bytes first, then 2, then 1: each begins where its type may begin.
_TYPES = {"f": "Float32Array", "i": "Int32Array", "H": "Uint16Array", "B": "Uint8Array"}


def page(name: str, steps: Sequence[Step], methods: list[dict[str, Any]], texts: dict[str, str], notes: str) -> str:
    """The page of a run.

    Args:
        methods: the run's own first (see :func:`cppo_verl.inspection.presets.presets`).
        texts: of every token id, as :func:`cppo_verl.inspection.vocabulary.texts` makes them.
        notes: what a reader has to know of how it was made, one sentence each.
    """
    packed = [_pack(step) for step in steps]
    content = {
        **{"run": name, "notes": notes, "methods": methods, "texts": texts, "unit": UNIT, "smallest": SMALLEST},
        "steps": [about for about, _ in packed],
    }
    style = _file("page.css")
    script = '"use strict";\n' + "\n".join(map(_file, SCRIPTS))
    # What the data hold is never executed: the policy allows these two texts only.
    policy = f"default-src 'none'; base-uri 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    blobs = [f'<script type="text/plain" id="blob-{at}">{blob}</script>' for at, (_, blob) in enumerate(packed)]
    parts = {
        **{"policy": policy, "title": html.escape(name), "style": style, "script": script},
        **{"data": _json(content), "blobs": "\n".join(blobs)},
    }
    # One pass over the template: what is put in is not looked at again.
    pieces = _file("page.html").split("%%")
    return "".join(piece if at % 2 == 0 else parts[piece] for at, piece in enumerate(pieces))


def _pack(step: Step) -> tuple[dict[str, Any], str]:
    """What describes a step's columns, and the columns: gzip in base64."""
    order = sorted(step.columns, key=lambda name: -step.columns[name].itemsize)
    layout, offset = {}, 0
    for name in order:
        column = step.columns[name]
        layout[name] = {"type": _TYPES[np.dtype(column.dtype).char], "offset": offset, "length": len(column)}
        offset += column.nbytes
    raw = b"".join(np.ascontiguousarray(step.columns[name]).tobytes() for name in order)
    about = step._asdict() | {"columns": layout}
    return about, base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()


def _json(value: object) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _file(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
