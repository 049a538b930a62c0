"""CPPO's mask on one dumped response: w_t D_t against the effective threshold c_t (Fig. 3)."""

from typing import TYPE_CHECKING, Any

from cppo_verl import core
from cppo_verl.figures.runs import Run
from cppo_verl.run.dumps import dumps_of, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(figure: "Figure", run: Run) -> bool:
    """The response with the most masked tokens; False for another method, or one whose c_t is no such curve."""
    method = run.config.method
    of_cppo = method._target_ == "cppo_verl.methods.Cppo"
    dumps = dumps_of(run.folder) if of_cppo else []
    if not dumps or method.delta_b is None or method.weights == "shuffled" or method.soft_gate:
        return False
    if method.get("length_reference") is not None:
        return False
    dump, row = _most_masked([load(file) for file in dumps], method.delta)
    one = {name: dump[name][row : row + 1] for name in ("log_prob", "rollout_log_prob", "advantages", "divergence")}
    mask = dump["response_mask"][row : row + 1]
    weights = core.position_weights(mask, method.w_min, schedule=method.weights, horizon=method.get("horizon"))
    region = core.cppo_mask(
        one["log_prob"] - one["rollout_log_prob"],
        one["advantages"],
        one["divergence"],
        mask,
        delta=method.delta,
        weights=weights,
        delta_b=dump["delta_b"][row : row + 1],
    )
    spent, position = (weights * one["divergence"])[mask], range(1, int(mask.sum()) + 1)
    blocked = ~region.keep[mask]
    returning = region.keep[mask] & (region.token_exceeded | region.prefix_exceeded)[mask] & (spent > 0)
    by_token = blocked & region.token_exceeded[mask]
    axis = figure.subplots()
    axis.bar(position, spent, color="#9ecae1", label="$w_t D_t$, kept: within $c_t$")
    for chosen, colour, label in (
        (returning, "#74c476", "kept: moves back to the rollout"),
        (by_token, "#de2d26", "masked: token threshold"),
        (blocked & ~by_token, "#fd8d3c", "masked: prefix budget"),
    ):
        places = [place for place, flag in zip(position, chosen, strict=True) if flag]
        if places:
            axis.bar(places, spent[chosen], color=colour, label=label)
        for place in places:  # a masked token is to be seen however small its own divergence is
            axis.axvspan(place - 0.5, place + 0.5, color=colour, alpha=0.15, linewidth=0)
    axis.axhline(method.delta, color="grey", linestyle=":", label=r"$\delta$")
    axis.step(position, region.threshold[mask].clamp_min(0), where="mid", color="black", label="$c_t$ (0 if negative)")
    axis.set(xlabel="token position t", ylabel="weighted divergence", title="CPPO's mask on one response")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)  # under the axis: bars may be anywhere
    return True


def _most_masked(dumps: list[dict[str, Any]], delta: float) -> tuple[dict[str, Any], int]:
    """The dump and row that show most of the mask: both causes if possible, on tokens whose divergence is visible."""
    best, chosen = -1, (dumps[0], 0)
    for dump in dumps:
        masked = (dump["gate"] < 1) & dump["response_mask"]
        visible = masked & (dump["divergence"] > delta / 50)
        by_token, by_prefix = (visible & dump["token_cause"]).sum(-1), (visible & ~dump["token_cause"]).sum(-1)
        scores = 100 * (by_token.clamp_max(1) + by_prefix.clamp_max(1)) + by_prefix + by_token
        if int(scores.max()) > best:
            best, chosen = int(scores.max()), (dump, int(scores.argmax()))
    return chosen
