"""The programs of a folder under scripts/, as importable modules."""

import sys
from contextlib import contextmanager


@contextmanager
def importable(folder):
    """While this lasts; afterwards another folder may have modules of the same names."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in {file.stem for file in folder.glob("*.py")} - before:
            sys.modules.pop(name, None)
