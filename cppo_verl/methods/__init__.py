"""The methods, one class each, over one shared divergence and reduction.

A method is its typed settings (explained, with their defaults, in ``configs/method/<name>.yaml``) plus one rule that
turns a batch of tokens into per-token losses. Hydra builds it from the config's ``_target_``; nothing here knows verl.
"""

from cppo_verl.methods.clipping import Aspo, Cispo, Fipo, Grpo, MinPro, Opsm
from cppo_verl.methods.masks import Banded, Cppo, Dppo, ImportanceSampling, M2po, Trm
from cppo_verl.methods.sequence import Gmpo, Gspo, Vespo
from cppo_verl.methods.smooth import Drpo, Sapo
from cppo_verl.methods.tokens import MEASURES, Measure, Outcome, Tokens, defined_on

__all__ = [
    "MEASURES",
    "Aspo",
    "Banded",
    "Cispo",
    "Cppo",
    "Dppo",
    "Drpo",
    "Fipo",
    "Gmpo",
    "Grpo",
    "Gspo",
    "ImportanceSampling",
    "M2po",
    "Measure",
    "MinPro",
    "Opsm",
    "Outcome",
    "Sapo",
    "Tokens",
    "Trm",
    "Vespo",
    "defined_on",
]
