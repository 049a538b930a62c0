"""What a run may not leave behind."""

import psutil


def leftovers(run):
    """Processes of the run: those that mention its folder, and Ray's or vLLM's that carry its tag."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CPPO_RUN_TAG") and process.environ().get("CPPO_RUN_FOLDER") == str(run):
                found.append(process)
        except psutil.Error:
            continue
    return found
