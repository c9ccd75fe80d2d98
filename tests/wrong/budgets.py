"""Budgets that cannot be read, limit nothing, or cannot be kept."""

from __future__ import annotations

import eke
from eke import Budget
from eke.compression import InfeasibleError, cross_entropy

from .row import Row, batches, compress, net

WRITE = (
    "A number and a unit: `'0.5x'` and `'50%'` are shares of what the model costs now, `'3ms'` and `'400kB'` absolute."
)
DROP = "`'1%'` or 0.01 is one point of accuracy, or one per cent of another score."

ROWS = [
    Row(
        "text as the budget",
        lambda _: compress(budget="0.5x"),
        TypeError,
        "budget must be an eke.Budget, got '0.5x': write eke.Budget(size='0.5x').",
        "Half of what, it does not say.",
        "`eke.Budget(latency='0.5x')`, or size, macs, parameters, peak_memory.",
    ),
    Row(
        "a dictionary as the budget",
        lambda _: compress(budget={"size": "0.5x"}),
        TypeError,
        "budget must be an eke.Budget, got {'size': '0.5x'}: write eke.Budget(size='0.5x').",
        "It must be checked.",
        "`eke.Budget(**limits)`.",
    ),
    Row(
        "no limit",
        lambda _: Budget(),
        ValueError,
        "Budget() limits nothing, got None for every field: give at least one, for example Budget(max_drop='1%', "
        "latency='0.5x').",
        "Without a limit there is nothing to look for.",
        WRITE,
    ),
    Row(
        "an unknown limit",
        lambda _: Budget(accuracy="1%"),
        TypeError,
        "Budget.__init__() got an unexpected keyword argument 'accuracy'",
        "eke has max_drop for what may be lost.",
        "max_drop, latency, size, macs, parameters, peak_memory.",
        python=True,
    ),
    Row(
        "an unknown argument",
        lambda _: compress(max_drop="1%"),
        TypeError,
        "compress() got an unexpected keyword argument 'max_drop'",
        "Limits stand in the budget.",
        "`budget=eke.Budget(max_drop='1%')`.",
        python=True,
    ),
    Row(
        "no budget",
        lambda _: eke.compress(net(), batches(), loss=cross_entropy),
        TypeError,
        "compress() missing 1 required keyword-only argument: 'budget'",
        "Without a limit there is nothing to look for.",
        "`budget=eke.Budget(size='0.5x')`.",
        python=True,
    ),
    Row(
        "a share without a unit",
        lambda _: compress(budget=Budget(size=0.5)),
        ValueError,
        "Budget.size=0.5 has no unit and means less than one: for a share of what the model costs now write '0.5x'.",
        "Without a unit it is half a byte.",
        WRITE,
    ),
    Row(
        "more than now",
        lambda _: compress(budget=Budget(latency="2x")),
        ValueError,
        "Budget.latency='2x' allows more than the model costs now, so it limits nothing: half of it is '0.5x' or "
        "'50%'.",
        "It is the time that may be taken, not the speed-up.",
        "Twice as fast is `'0.5x'`.",
    ),
    Row(
        "an unknown unit",
        lambda _: Budget(size="3 apples"),
        ValueError,
        "Budget.size has the unknown unit 'apples' in '3 apples'; allowed: 'x', '%', 'b', 'kb', 'mb', 'gb', 'kib', "
        "'mib', "
        "'gib'.",
        "Each cost has its own units.",
        WRITE,
    ),
    Row(
        "a time without a unit",
        lambda _: Budget(latency=3),
        ValueError,
        "Budget.latency has no unit in 3; allowed: 'x', '%', 's', 'ms', 'us'.",
        "Seconds or milliseconds?",
        "`'3ms'`.",
    ),
    Row(
        "a word",
        lambda _: Budget(size="half"),
        ValueError,
        "Budget.size could not be read: 'half'. Write for example '0.5x', '50%' or '400kB'.",
        "It is no number.",
        WRITE,
    ),
    Row(
        "a decimal comma",
        lambda _: Budget(size="0,5x"),
        ValueError,
        "Budget.size could not be read: '0,5x'.",
        "Numbers have a point.",
        "`'0.5x'`.",
    ),
    Row(
        "a negative limit",
        lambda _: Budget(macs="-1x"),
        ValueError,
        "Budget.macs could not be read: '-1x'.",
        "Nothing costs less than nothing.",
        WRITE,
    ),
    Row(
        "a limit of 0",
        lambda _: Budget(size="0x"),
        ValueError,
        "Budget.size must be positive and finite, got '0x'.",
        "A model takes some bytes.",
        WRITE,
    ),
    Row(
        "True",
        lambda _: Budget(size=True),
        TypeError,
        "Budget.size must be a number or text such as '0.5x', got True.",
        "It is no number.",
        WRITE,
    ),
    Row(
        "a drop of 0",
        lambda _: Budget(max_drop=0),
        ValueError,
        "Budget.max_drop must be positive and finite, got 0; samples never prove a drop of 0: give '0.5%', or leave "
        "it out.",
        "Every measured accuracy has an interval.",
        DROP,
    ),
    Row(
        "a drop of 5",
        lambda _: Budget(max_drop=5),
        ValueError,
        "Budget.max_drop must be below 100 %, got 5: one point is '1%' or 0.01.",
        "Without a unit it is a share.",
        DROP,
    ),
    Row(
        "a drop in another unit",
        lambda _: Budget(max_drop="1x"),
        ValueError,
        "Budget.max_drop has the unknown unit 'x' in '1x': write '1%' or 0.01.",
        "The first argument is max_drop.",
        "Name the limit: `Budget(size='0.5x')`.",
    ),
    Row(
        "a budget below the smallest plan",
        lambda _: compress(budget=Budget(size="0.01x")),
        InfeasibleError,
        "The budget is below the smallest plan. Nearest feasible: size ... (limit 33.56 B). Raise the limits or allow "
        "more "
        "structures.",
        "Every plan keeps some of each layer.",
        "The message names the nearest possible limit.",
    ),
    Row(
        "limits that contradict each other",
        lambda _: compress(budget=Budget(size="0.9x", macs="0.001x")),
        InfeasibleError,
        "The budget is below the smallest plan. Nearest feasible: ... macs ... (limit 22.53 MAC)",
        "All limits must be kept at once.",
        "Raise the one in the message.",
    ),
    Row(
        "one budget for a front",
        lambda _: eke.front(net(), batches(), loss=cross_entropy, budgets=Budget(size="0.5x")),
        TypeError,
        "budgets must be a list of eke.Budget, got Budget: write budgets=[...].",
        "A front has several.",
        "A list of budgets, or `eke.compress` for one.",
    ),
    Row(
        "texts for a front",
        lambda _: eke.front(net(), batches(), loss=cross_entropy, budgets=[0.5]),
        TypeError,
        "budget must be an eke.Budget, got 0.5: write eke.Budget(size='0.5x').",
        "Half of what, it does not say.",
        "`budgets=[eke.Budget(size='0.5x')]`.",
    ),
    Row(
        "a front without a cost",
        lambda _: eke.front(net(), batches(), loss=cross_entropy, budgets=[Budget(max_drop="9%")]),
        ValueError,
        "front needs budgets that each limit a cost, got [Budget(max_drop='9%'",
        "Its points differ in cost.",
        "Limit latency, size or another cost in each.",
    ),
]
