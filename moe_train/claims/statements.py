"""What a comparison says, and what it can see, in words."""

from __future__ import annotations

from moe_train.claims.plan import Plan
from moe_train.claims.statistics import MOST_SEEDS, detectable, power, seeds_needed
from moe_train.config.claim import TO_TARGET, ComparisonConfig

_DECIDES = 0.5  # a power below which a suite is likelier to end undecided than not


def statement(config: ComparisonConfig) -> str:
    """What would be supported, in words."""
    test, measure = config.test, config.measure
    margin = f"{test.margin:.3%}" if test.relative else f"{test.margin:g}"
    if test.kind == "ratio_above":
        return f"{measure} of {config.against} over that of {config.arm} is above {margin}"
    if test.kind in ("below", "above"):
        return f"{measure} of {config.arm} is {test.kind} {margin}"
    words = {
        "superiority": f"lower by more than {margin}" if test.margin else "lower",
        "non_inferiority": f"higher by less than {margin}",
        "tost": f"within ±{margin}",
    }
    return f"{measure} of {config.arm} is {words[test.kind]} against {config.against}"


def power_statements(plan: Plan) -> list[tuple[str, str]]:
    """(statement, what it can see) of the comparisons that decide."""
    config = plan.claim.config
    return [(statement(c), power_statement(plan, c)) for c in config.at(plan.scale_name) if c.decides]


def power_statement(plan: Plan, config: ComparisonConfig, measured: float | None = None) -> str:
    """What the comparison can see at this scale, with the scatter that the claim's file expects or was measured."""
    seeds, test = plan.scale.seeds, config.test
    if config.measure in TO_TARGET:
        return "power not reckoned: it hangs on the slopes of the curves; the interval says what could be seen"
    if measured is None and config.measure != "val_loss":
        return "power not reckoned beforehand: how far seeds scatter is known of losses alone"
    sigma = plan.claim.config.sigma if measured is None else measured
    if sigma == 0:
        return "seeds do not scatter: any effect is seen"
    family = sum(c.decides == config.decides for c in plan.claim.config.at(plan.scale_name))
    alpha = test.alpha / family  # the first step of Holm
    error = sigma if config.paired else sigma * 2**0.5  # of a difference of two arms that have nothing in common
    who = f"{seeds} seeds scattering by {sigma:.2g}"
    if test.kind in ("tost", "non_inferiority"):
        share = power(test.kind, test.margin, 0.0, error, seeds, alpha)
        enough = seeds_needed(test.kind, test.margin, error, alpha)
        many = f"over {MOST_SEEDS:,}" if enough is None else f"{enough:,}"
        few = ", too few to decide" if share < _DECIDES else ""
        return f"{who} show it in {share:.0%} of suites where there is no difference{few}; 80% take {many} seeds"
    return f"{who} see an effect {detectable(error, seeds, alpha):.2g} beyond its bound in 80% of suites"
