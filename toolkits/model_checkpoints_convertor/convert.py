"""Conversion by position, for scripts that know the order of their arguments by heart.

    python toolkits/model_checkpoints_convertor/convert.py ORDER ARGUMENT... [--dry-run]
    python toolkits/model_checkpoints_convertor/convert.py --help           every order
    python toolkits/model_checkpoints_convertor/convert.py ORDER --help     one of them

Checks every argument, prints what became of each and the `megatron-patch` command that does the same, and runs that.
The scripts in the folders of the families call this. It does not convert, and knows no family.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

# A script starts with its own folder on the path. In front, since the predecessor's package has the same name as ours.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_patch.checkpoint.arguments import ConvertArgs, VerifyArgs
from megatron_patch.launch.main import main as megatron_patch
from toolkits.model_checkpoints_convertor.command import ENVIRONMENT, Command, command
from toolkits.model_checkpoints_convertor.orders import ORDERS, ROLES, Order, closest, read

USAGE = "usage: convert.py ORDER ARGUMENT... [--dry-run]"


def main(argv: list[str] | None = None) -> int:
    """Runs a call and returns its exit code; 2 for a user's mistake."""
    word, *values = (sys.argv[1:] if argv is None else argv) or [""]
    if word in ("-h", "--help", "help"):
        print(_all_orders())
        return 0
    if word in ORDERS and values in (["-h"], ["--help"]):
        print(_one_order(ORDERS[word]))
        return 0
    dry_run = values[-1:] == ["--dry-run"]
    values = values[:-1] if dry_run else values
    try:
        order, by_role = read(word, values)
        plan = command(order, by_role, os.environ)
    except ValueError as error:
        return _refuse(word, values, str(error))
    print(_report(order, values, plan), flush=True)
    if dry_run or os.environ.get("DRY_RUN") == "1":
        return _rehearse(word, plan)
    return megatron_patch(list(plan.argv))


def _rehearse(word: str, plan: Command) -> int:
    """Let the command's own parser judge it, and stop."""
    import tyro

    name, *flags = plan.argv
    arguments = {"convert": ConvertArgs, "verify": VerifyArgs}[name]
    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        tyro.cli(arguments, args=flags, prog=f"megatron-patch {name}", config=config).validate()
    except ValueError as error:
        return _fail(word, str(error))
    print("dry run: nothing is done")
    return 0


def _refuse(word: str, values: Sequence[str], problem: str) -> int:
    if word in ORDERS:
        order = closest(ORDERS[word], values)
        print(f"order {order.word}\n{_columns(_given(order, values))}\n", file=sys.stderr)
        return _fail(word, problem)
    print(USAGE, file=sys.stderr)
    return _fail("", problem if word else "name an order; --help lists them")


def _fail(word: str, problem: str) -> int:
    for line in problem.splitlines():
        print(f"{f'convert.py {word}'.strip()}: error: {line}", file=sys.stderr)
    return 2


# ----------------------------------------------------------------------------------------------------- what is printed


def _report(order: Order, values: Sequence[str], plan: Command) -> str:
    rows = [
        (str(one.number), one.name, value, plan.effects[one.role])
        for one, value in zip(order.arguments, values, strict=False)
    ]
    used = [name for name in ENVIRONMENT if os.environ.get(name) and name in plan.effects]
    rows += [("env", name, os.environ[name], plan.effects[name]) for name in used]
    warnings = [f"warning: {text}" for text in plan.warnings]
    return "\n".join([f"order {order.word}", _columns(rows), *warnings, "", f"$ {plan.line}"])


def _given(order: Order, values: Sequence[str]) -> list[tuple[str, ...]]:
    """A call that was refused, each value beside the name that its place has."""
    rows = []
    for index in range(max(len(values), len(order.arguments))):
        value = values[index] if index < len(values) else "-"
        known = index < len(order.arguments)
        name = order.arguments[index].name if known else "-"
        wrong = not known or (index < len(values) and order.arguments[index].problem(value) != "")
        rows.append((str(index + 1), name, value, "<- wrong" if wrong else ""))
    return rows


def _columns(rows: Iterable[tuple[str, ...]]) -> str:
    rows = [tuple(rows_) for rows_ in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = (
        "  ".join([*(word.ljust(width) for word, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _all_orders() -> str:
    orders = _columns((order.word, order.signature) for order in ORDERS.values())
    environment = _columns(ENVIRONMENT.items())
    return f"{USAGE}\n\norders ([...] may be left out)\n{orders}\n\nenvironment variables\n{environment}"


def _one_order(order: Order) -> str:
    rows = [
        (str(one.number), one.name, f"{ROLES[one.role].meaning}; {ROLES[one.role].rule}") for one in order.arguments
    ]
    return f"order {order.word}: {order.counts} arguments\n{_columns(rows)}"


if __name__ == "__main__":  # a conversion may start processes that import this file again
    sys.exit(main())
