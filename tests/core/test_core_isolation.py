"""`cppo_verl.core` needs torch and the standard library, nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cppo_verl.core

CORE = Path(cppo_verl.core.__file__).parent
ROOT = CORE.parent.parent
BLOCKED = ("verl", "ray", "vllm", "transformers", "hydra", "omegaconf")
MODULES = ("divergence", "weights", "masks", "surrogate")

PROBE = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
for name in {BLOCKED!r}:
    try:
        __import__(name)
    except ImportError as error:
        assert "blocked" in str(error)
    else:
        raise AssertionError(name + " was not blocked")
import cppo_verl.core
for name in {MODULES!r}:
    __import__("cppo_verl.core." + name)
import torch
from cppo_verl.core.masks import cppo_mask
one = torch.ones(1, 1)
assert not cppo_mask(one, one, one, one, delta=0.1, weights=one, delta_b=None).keep.any()
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & set({BLOCKED!r}), loaded
"""


def test_core_imports_and_runs_with_the_heavy_packages_blocked():
    run = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", sorted(CORE.glob("**/*.py")), ids=lambda p: p.name)
def test_core_files_import_torch_and_the_standard_library_only(path):
    """Lazy imports inside functions count as well."""
    allowed = set(sys.stdlib_module_names) | {"torch"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path.name}:{node.lineno} reaches out of core"
            continue
        else:
            continue
        for name in names:
            inside = name == "cppo_verl.core" or name.startswith("cppo_verl.core.")
            assert inside or name.split(".")[0] in allowed, f"{path.name}:{node.lineno} imports {name}"
