"""A package with a method of its own, as pip would leave it: a module, its settings, an entry point."""

MODULE = '''
from dataclasses import dataclass

import torch

from cppo_verl import core
from cppo_verl.methods import Outcome, Tokens


@dataclass(frozen=True)
class RunningMax:
    """keep_t = [A_t (rho_t - 1) <= 0] or [max_{j<=t} D_j <= delta]."""

    name: str
    delta: float
    ratio_cap: float | None = 20.0
    needs_response_seeds = False

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"method.delta must be > 0; got {self.delta}")

    def __call__(self, tokens: Tokens) -> Outcome:
        exceeded = tokens.valid & (tokens.divergence > self.delta)
        corrective = torch.sign(tokens.advantages) * torch.sign(tokens.log_ratio) <= 0
        gate = (tokens.valid & (corrective | (exceeded.cumsum(-1) == 0))).float()
        loss = core.ratio_loss(
            tokens.log_prob, tokens.rollout_log_prob, tokens.advantages, gate, ratio_cap=self.ratio_cap
        )
        return Outcome(loss, gate, exceeded)
'''


def install(site, name="running_max", settings="delta: ${divergence.thresholds.dppo_delta}\n", module=MODULE):
    """Write the package into ``site``, a folder for PYTHONPATH; ``settings``: of its YAML file, or None."""
    package = site / "my_methods"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "running.py").write_text(module)
    if settings is not None:
        (package / f"{name}.yaml").write_text(settings)
    info = site / "my_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cppo_verl.methods]\n{name} = my_methods.running:RunningMax\n")
    return site
