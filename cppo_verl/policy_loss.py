"""Our methods as policy losses of verl's own trainer, for scripts that do not use ours:

    actor_rollout_ref.model.external_lib=cppo_verl.policy_loss
    actor_rollout_ref.actor.policy_loss.loss_mode=cppo
    algorithm.rollout_correction.bypass_mode=true

Every method is registered under its name, ``cppo_verl.NAME`` where verl has one of that name; :func:`register` adds one
with other settings. D_t is binary: verl hands a policy loss nothing but log-probabilities of the sampled tokens. The
third line makes verl's ``old_log_probs`` the rollout's, to which the trust region is anchored. docs/policy_loss.md
"""

from typing import TYPE_CHECKING

from cppo_verl.adapters.actor.registered_loss import RegisteredLoss
from cppo_verl.config.check_settings import check_method
from cppo_verl.config.compose import choices, compose
from cppo_verl.problems import ConfigError

if TYPE_CHECKING:
    from cppo_verl.methods.tokens import Rule

DIVERGENCES = ("binary_tv", "binary_kl", "k3")


def register(name: str, *overrides: str) -> None:
    """Register a policy loss for ``loss_mode=name``.

    Args:
        overrides: as for ``cppo train``, e.g. ``"method=cppo", "method.delta=0.2"``; ``divergence=`` one of DIVERGENCES
            (default: the binary one of the method's own kind).

    Raises:
        ConfigError: where the loss is first called, if ``cppo train`` would refuse the overrides, or they name a Top-K
            divergence.
    """
    RegisteredLoss.register(name, lambda: _built(overrides))


def _built(overrides: tuple[str, ...]) -> "tuple[Rule, str]":
    from hydra.utils import instantiate

    config = compose(["platform=cpu", *overrides])
    if config.divergence.name not in DIVERGENCES:
        if any(override.startswith("divergence=") for override in overrides):
            wanted = ", ".join(DIVERGENCES)
            raise ConfigError(f"divergence={config.divergence.name}: a policy loss sees no Top-K; use one of {wanted}")
        config = compose(["platform=cpu", *overrides, f"divergence=binary_{config.divergence.kind}"])
    if problems := list(check_method(config)):
        raise ConfigError.of(problems)
    return instantiate(config.method), str(config.divergence.name)


for _name in choices("method"):
    register(_name, f"method={_name}")
