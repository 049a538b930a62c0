"""``cppo doctor``: can this machine run what is asked for? One line a finding, with what to do about it."""

import json
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cppo_verl.doctor import files, machine
from cppo_verl.doctor.findings import Finding, Subject, fail, ok, readable, skip, warn
from cppo_verl.run.terminal import one_line, say

# Seconds for a check in this process: a file system that hangs, a hub that does not answer.
LIMIT = 30.0
# How the names of probes' temporary folders begin.
SCRATCH = "cppo-doctor-"


class Check(NamedTuple):
    """A name and what it finds."""

    name: str
    find: Callable[[Subject], Iterator[Finding]]
    bare: bool = False
    """Looks at no setting, and can be made where none can be composed."""
    apart: bool = False
    """Done by a process of its own, with limits of its own."""


def doctor(overrides: Sequence[str], ray: bool, as_json: bool) -> int:
    """Print every finding; returns 1 where one is ``FAIL``, 2 where the overrides cannot be composed, else 0.

    Args:
        overrides: as for ``cppo train``. Without any the machine is examined, with some this run's files as well.
        ray: False leaves out starting or joining Ray.
        as_json: one JSON object a line (check, status, found, remedy) instead of text.
    """
    counts: Counter[str] = Counter()

    def show(name: str, finding: Finding) -> None:
        counts[finding.status] += 1
        if as_json:
            say(json.dumps({"check": name, **finding._asdict()}))
            return
        say(f"{finding.status:<5} {name:<11} {finding.found}")
        if finding.remedy:
            say(f"{'':<17} -> {finding.remedy}")

    subject, chosen = None, [check for check in CHECKS if ray or check.name != "Ray"]
    try:
        subject = _subject(overrides)
    except Exception as error:
        if overrides and _composes():
            for line in str(error).split("\n"):
                say(one_line(f"cppo doctor: {line}"), sys.stderr)
            return 2
        show("settings", fail(f"none can be composed: {_short(error)}; only the machine is examined", _SETUP))
        chosen = [check for check in chosen if check.bare]
    for check in chosen:
        for finding in findings(check, subject):
            show(check.name, finding)
    if not as_json:
        say(", ".join(f"{counts[status]} {status}" for status in ("ok", "warn", "FAIL", "skip")))
    return 1 if counts["FAIL"] else 0


_SETUP = "scripts/setup.sh"


def _subject(overrides: Sequence[str]) -> Subject:
    from cppo_verl.config.compose import compose

    return Subject(compose(overrides), described=bool(overrides))


def _composes() -> bool:
    """Whether the defaults do, so that the overrides are to blame and not the installation."""
    try:
        _subject([])
    except Exception:
        return False
    return True


def findings(check: Check, subject: Subject | None) -> Iterator[Finding]:
    """What the check finds; a check that raises or takes too long has found that, and the next one can be made."""
    found: list[Finding] = []

    def collect() -> None:
        try:
            found.extend(check.find(subject))  # type: ignore[arg-type]
        except Exception as error:
            found.append(_raised(error))

    if check.apart:
        try:
            yield from check.find(subject)  # type: ignore[arg-type]
        except Exception as error:
            yield _raised(error)
        return
    # Not in the main thread: a call into a dead network file system cannot be interrupted, but it can be left behind.
    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(LIMIT)
    if thread.is_alive():
        yield fail(f"no answer within {LIMIT:g} s", "look for a network file system that hangs: mount, df, dmesg")
    else:
        yield from found


def _raised(error: Exception) -> Finding:
    missing = isinstance(error, ImportError)
    return fail(_short(error), _SETUP if missing else "mend what the message names; the other checks go on")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def probe(what: str, subject: Subject) -> Iterator[Finding]:
    """Findings of ``python -m cppo_verl.doctor.probe what``, with the environment that ``cppo train`` gives.

    It is killed, with all that it has started, when it takes longer than it announced.
    """
    from omegaconf import OmegaConf

    from cppo_verl.run.folder import CONFIG
    from cppo_verl.run.supervisor import RUN_FOLDER, RUN_TAG, end_run, process_environment, start

    tag = uuid.uuid4().hex
    environment = {**process_environment(subject.on_cpu, str(subject.model), subject.cluster), RUN_TAG: tag}
    environment.pop(RUN_FOLDER, None)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as name:
        folder = Path(name)
        OmegaConf.save(subject.config, folder / CONFIG, resolve=True)
        arguments = [what, name, "run"] if subject.described else [what, name]
        process = None
        try:
            with open(folder / "log", "wb") as log:
                process = start("cppo_verl.doctor.probe", arguments, log, environment)
            yield from _follow(process, folder)
        finally:
            end_run(process, tag, patience=0)


def _follow(process: "subprocess.Popen[bytes]", folder: Path) -> Iterator[Finding]:
    from cppo_verl.run.files import read_lines
    from cppo_verl.run.log import EVENTS

    doing, remedy, deadline, seen = "Python to start", _SETUP, time.monotonic() + 60, 0
    while True:
        ended = process.poll() is not None
        events = list(read_lines(folder / EVENTS)) if (folder / EVENTS).exists() else []
        for event in events[seen:]:
            if event["event"] == "finding":
                yield Finding(event["status"], event["found"], event["remedy"])
                continue
            doing, remedy, deadline = event["what"], event["remedy"], time.monotonic() + event["limit"]
            say(f"...   waiting for {doing} ({event['limit']} s at most)", sys.stderr)
        seen = len(events)
        if ended:
            break
        if time.monotonic() > deadline:
            yield fail(f"waited too long for {doing}", remedy)
            return
        time.sleep(0.1)
    if process.returncode:
        lines = (folder / "log").read_text(errors="replace").strip().splitlines() or ["no message"]
        yield fail(f"exit status {process.returncode} while waiting for {doing}: {lines[-1].strip()}", remedy)


def check_cuda(subject: Subject) -> Iterator[Finding]:
    from cppo_verl.run.machine import has_gpu

    if subject.on_cpu:
        yield skip("platform=cpu")
    elif subject.cluster and not has_gpu():
        yield skip("no NVIDIA GPU here; the nodes of the cluster have them")
    else:
        yield from probe("cuda", subject)


def check_leftovers(_: Subject) -> Iterator[Finding]:
    from cppo_verl.run.supervisor import stale_processes

    stale = stale_processes()
    for folder, pids, size in stale:
        found = f"{folder}: {len(pids)} processes with {readable(size)} go on without a launcher"
        yield warn(found, f"kill {' '.join(map(str, pids))}")
    if not stale:
        yield ok("no processes of earlier runs")


CHECKS: tuple[Check, ...] = (
    Check("Python", machine.check_python, bare=True),
    Check("stack", machine.check_stack),
    Check("versions", machine.check_versions, bare=True),
    Check("GPUs", machine.check_driver),
    Check("CUDA", check_cuda, apart=True),
    Check("memory", machine.check_memory, bare=True),
    Check("/dev/shm", machine.check_shared_memory, bare=True),
    Check("open files", machine.check_open_files, bare=True),
    Check("disk", files.check_disk),
    Check("leftovers", check_leftovers, bare=True),
    Check("settings", files.check_settings),
    Check("data", files.check_data),
    Check("model", files.check_model),
    Check("wandb", files.check_wandb),
    Check("plug-in", partial(probe, "plugin"), apart=True),
    Check("Ray", partial(probe, "ray"), apart=True),
)
