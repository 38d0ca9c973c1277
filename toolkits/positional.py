"""Scripts that are called by position: orders of arguments as data, the check of a call, and what is printed of it.

A toolkit declares its orders (`Order`), what its arguments are for (`Role`), and a function from a call to the
`megatron-patch` command that does it (a `Draft` becomes a `Command`); `Program` is the rest: it reads the call, prints
what became of each argument and the command, and runs that. Every wrong argument is named at once, with its number, its
value and the rule. It knows neither conversion nor data.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

NONE = "none"
"""What a path may be where there is none."""


# -------------------------------------------------------------------------------------------------- what a value may be


@dataclass(frozen=True)
class Role:
    """What an argument is for, and which values it may have."""

    meaning: str
    rule: str
    accepts: Callable[[str], bool]


def whole(least: int) -> tuple[str, Callable[[str], bool]]:
    """Rule and check of a whole number."""
    return f"must be a whole number of at least {least}", lambda text: is_number(text) and int(text) >= least


def is_number(text: str) -> bool:
    """Whether a text is a whole number in plain digits."""
    return text.isascii() and text.isdecimal()


def one_of(*choices: str) -> tuple[str, Callable[[str], bool]]:
    """Rule and check of a choice."""
    return f"choose {', '.join(choices[:-1])} or {choices[-1]}", choices.__contains__


def _is_megatron_lm(text: str) -> bool:
    """Megatron-LM itself, or the checkout of a patch that holds copies of it."""
    path = Path(text)
    inside = ("megatron", "megatron_patch", "*Megatron-LM*", "backends/megatron")
    return text == NONE or (path.is_dir() and any(any(path.glob(name)) for name in inside))


MEGATRON_LM = Role(
    "a Megatron-LM checkout; megatron-core is an installed package here",
    "must be a directory with megatron/ in it (or a checkout that holds Megatron-LM), or none",
    _is_megatron_lm,
)
PATCH = Role(
    "a checkout of the patch; this one does it",
    "must be a directory with megatron_patch/ in it, or none",
    lambda text: text == NONE or (Path(text) / "megatron_patch").is_dir(),
)


# --------------------------------------------------------------------------------------------------------------- orders


@dataclass(frozen=True)
class Argument:
    """One place of an order."""

    number: int
    name: str
    role: str
    rule: Role

    def problem(self, value: str) -> str:
        """What is wrong with a value; empty if nothing is."""
        rule = self.rule.rule if value else "is empty"
        return "" if value and self.rule.accepts(value) else f"argument {self.number} {self.name}={value!r}: {rule}"


@dataclass(frozen=True)
class Order:
    """One order of arguments. A toolkit's own orders say what their names stand for."""

    roles: ClassVar[Mapping[str, Role]] = MappingProxyType({})
    """Every role, by its word."""

    roles_of_names: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Name of an argument -> the word of its role, where an order does not say otherwise (`NAME=role`)."""

    word: str
    names: str
    """Of the arguments, in order."""

    optional: int = field(default=0, kw_only=True)
    """How many arguments at the end may be left out."""

    older: str = field(default="", kw_only=True)
    """Orders that had the same script's name before; a call is read as the one that its values fit."""

    hint: str = field(default="", kw_only=True)
    """What to tell somebody whose call lacks arguments."""

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        """Its places."""
        pairs = (word.partition("=")[::2] for word in self.names.split())
        named = ((name, role or self.roles_of_names[name]) for name, role in pairs)
        return tuple(Argument(i, name, role, self.roles[role]) for i, (name, role) in enumerate(named, 1))

    @property
    def signature(self) -> str:
        """The names in order, numbered, those that may be left out in brackets."""
        first = len(self.arguments) - self.optional
        words = (
            f"{one.number} {one.name}" if one.number <= first else f"[{one.number} {one.name}]"
            for one in self.arguments
        )
        return " ".join(words)

    @property
    def counts(self) -> str:
        """How many arguments it takes, for a person."""
        *few, most = map(str, range(len(self.arguments) - self.optional, len(self.arguments) + 1))
        return f"{', '.join(few)} or {most}" if few else most

    def fits_count(self, values: Sequence[str]) -> bool:
        """Whether a call has as many arguments as this order."""
        return 0 <= len(self.arguments) - len(values) <= self.optional

    def wrong_values(self, values: Sequence[str]) -> list[str]:
        """What is wrong with the values that a call has, one line each."""
        return [text for one, value in zip(self.arguments, values, strict=False) if (text := one.problem(value))]

    def problems(self, values: Sequence[str]) -> list[str]:
        """What is wrong with a call, one line each."""
        if self.fits_count(values):
            return self.wrong_values(values)
        word = "argument" if self.counts == "1" else "arguments"
        takes = f"order {self.word} takes {self.counts} {word}, not {len(values)}"
        missing = self.arguments[len(values) : len(self.arguments) - self.optional]
        if missing:
            names = ", ".join(f"{one.number} {one.name}" for one in missing)
            return [f"{takes}; missing: {names}{self.hint and f' ({self.hint})'}"]
        return [f"{takes}; too many: {' '.join(values[len(self.arguments) :])}"]

    def name(self, role: str) -> str:
        """`argument 3 NAME` of the argument with a role."""
        return next(f"argument {one.number} {one.name}" for one in self.arguments if one.role == role)


O = TypeVar("O", bound=Order)  # noqa: E741


def by_word(*orders: O) -> Mapping[str, O]:
    """Orders by the word that names each."""
    return MappingProxyType({order.word: order for order in orders})


def read(orders: Mapping[str, O], word: str, values: Sequence[str]) -> tuple[O, dict[str, str]]:
    """The order a call is in, and its values by role.

    Raises:
        ValueError: no such order, or the call does not fit it; every wrong argument is named.
    """
    if word not in orders:
        raise ValueError(f"unknown order {word!r}; choose one of {', '.join(orders)}")
    order = closest(orders, orders[word], values)
    if problems := order.problems(values):
        raise ValueError("\n".join([*problems, *_other_orders(orders, orders[word], order, values)]))
    return order, {one.role: value for one, value in zip(order.arguments, values, strict=False)}


def closest(orders: Mapping[str, O], order: O, values: Sequence[str]) -> O:
    """The order, or the older one under the same name, that fits a call best: by its number of arguments first."""

    def misfit(one: O) -> tuple[bool, int, int]:
        surplus = max(0, len(values) - len(one.arguments))
        return not one.fits_count(values), surplus, len(one.wrong_values(values))

    return min(_namesakes(orders, order), key=misfit)


def _namesakes(orders: Mapping[str, O], order: O) -> list[O]:
    """An order, and those that had the same script's name before."""
    return [order, *(orders[word] for word in order.older.split())]


def _other_orders(orders: Mapping[str, O], order: O, chosen: O, values: Sequence[str]) -> list[str]:
    """Where the number of arguments fits no order: what the others of the same name take."""
    others = [one for one in _namesakes(orders, order) if one.word != chosen.word]
    if chosen.fits_count(values) or not others:
        return []
    return [f"under the same name: {'; '.join(f'order {one.word} takes {one.counts}' for one in others)}"]


# ------------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Command:
    """What to run, and what to tell."""

    argv: tuple[str, ...]
    """Arguments of `megatron-patch`."""

    effects: Mapping[str, str]
    """What became of each argument, by role, and of each environment variable, by name."""

    warnings: tuple[str, ...] = ()

    incomplete: str = ""
    """Why the command cannot run as it stands; it is only shown then."""

    launcher: tuple[str, ...] = ("megatron-patch",)
    """What starts it."""

    @property
    def line(self) -> str:
        """The command as a shell reads it."""
        return shlex.join((*self.launcher, *self.argv))


def choice_problems(environment: Mapping[str, str], choices: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Environment variables that are set to none of their choices."""
    return [
        f"environment variable {name}={environment[name]!r}: {one_of(*allowed)[0]}"
        for name, allowed in choices.items()
        if environment.get(name) and environment[name] not in allowed
    ]


@dataclass
class Draft(Generic[O]):
    """A command in the making."""

    order: O
    values: Mapping[str, str]
    """The call's, by role."""

    environment: Mapping[str, str]
    """Environment variables of ours, those that are set."""

    flags: list[str] = field(default_factory=list)
    effects: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def is_on(self, role: str) -> bool:
        """Whether an argument is `true`."""
        return self.values.get(role) == "true"

    def use(self, role: str, *flag: str, why: str = "") -> None:
        """Give the command a flag and note it as the argument's effect."""
        self.flags += flag
        self.effects[role] = shlex.join(flag) + why

    def refuse(self, role: str, why: str) -> None:
        """Say what is wrong with an argument or environment variable."""
        if role in self.values:
            self.problems.append(f"{self.order.name(role)}={self.values[role]!r}: {why}")
        else:
            self.problems.append(f"environment variable {role}={self.environment[role]!r}: {why}")

    def use_workers(self) -> None:
        """As many processes as WORKERS says, or one a core."""
        workers = self.environment.get("WORKERS") or str(len(os.sched_getaffinity(0)))
        rule, accepts = whole(1)
        if not accepts(workers):
            self.refuse("WORKERS", rule)
        self.use("WORKERS", "--workers", workers)

    def more_flags(self, name: str) -> list[str]:
        """The words of an environment variable that holds more flags; ValueError where a shell could not read it."""
        try:
            words = shlex.split(self.environment.get(name, ""))
        except ValueError as error:
            raise ValueError(f"environment variable {name}: {error}") from error
        if words:
            self.effects[name] = "added to the command"
        return words


# ---------------------------------------------------------------------------------------------------------- the program


@dataclass(frozen=True)
class Program(Generic[O]):
    """A script NAME ORDER ARGUMENT... [--dry-run]."""

    name: str
    orders: Mapping[str, O]
    environment: Mapping[str, str]
    """Environment variables that change a call, and how."""

    command: Callable[[O, Mapping[str, str], Mapping[str, str]], Command]
    """From an order, the values by role and the environment to the command; ValueError for what does not fit."""

    parsers: Mapping[str, type]
    """The arguments of each `megatron-patch` command that may come of it, for a rehearsal."""

    run: Callable[[list[str]], int]
    """`megatron-patch` itself."""

    @property
    def usage(self) -> str:
        """Its first line of help."""
        return f"usage: {self.name} ORDER ARGUMENT... [--dry-run]"

    def main(self, argv: Sequence[str]) -> int:
        """Runs a call and returns its exit code; 2 for a user's mistake."""
        understood = self.understand(argv)
        if isinstance(understood, int):
            return understood
        plan, dry_run = understood
        return finish(f"{self.name} {argv[0]}", plan, dry_run, self.parsers, self.run)

    def understand(self, argv: Sequence[str]) -> tuple[Command, bool] | int:
        """Prints what a call means and returns its command, and whether to stop there; or the exit code, where all is
        said: help, or what is wrong."""
        word, *values = argv or [""]
        if word in ("-h", "--help", "help"):
            print(self._all_orders())
            return 0
        if word in self.orders and values in (["-h"], ["--help"]):
            print(_one_order(self.orders[word]))
            return 0
        dry_run = values[-1:] == ["--dry-run"]
        values = values[:-1] if dry_run else values
        try:
            order, by_role = read(self.orders, word, values)
            plan = self.command(order, by_role, os.environ)
        except ValueError as error:
            return self._refuse(word, values, str(error))
        print(self._report(order, values, plan), flush=True)
        return plan, dry_run or os.environ.get("DRY_RUN") == "1"

    def _refuse(self, word: str, values: Sequence[str], problem: str) -> int:
        if word in self.orders:
            order = closest(self.orders, self.orders[word], values)
            print(f"order {order.word}\n{columns(_given(order, values))}\n", file=sys.stderr)
            return fail(f"{self.name} {word}", problem)
        print(self.usage, file=sys.stderr)
        return fail(self.name, problem if word else "name an order; --help lists them")

    def _report(self, order: O, values: Sequence[str], plan: Command) -> str:
        rows = [
            (str(one.number), one.name, value, plan.effects[one.role])
            for one, value in zip(order.arguments, values, strict=False)
        ]
        used = [name for name in self.environment if os.environ.get(name) and name in plan.effects]
        rows += [("env", name, os.environ[name], plan.effects[name]) for name in used]
        return report(f"order {order.word}", rows, plan)

    def _all_orders(self) -> str:
        orders = columns((order.word, order.signature) for order in self.orders.values())
        environment = columns(self.environment.items())
        return f"{self.usage}\n\norders ([...] may be left out)\n{orders}\n\nenvironment variables\n{environment}"


def fail(name: str, problem: str) -> int:
    """Prints what is wrong with a call of a script and returns the exit code of a user's mistake."""
    for line in problem.splitlines():
        print(f"{name}: error: {line}", file=sys.stderr)
    return 2


def finish(
    name: str, plan: Command, dry_run: bool, parsers: Mapping[str, type], run: Callable[[list[str]], int]
) -> int:
    """Runs what has been printed, or lets the command's own parser judge it and stops; returns the exit code."""
    if plan.incomplete:
        print(plan.incomplete)
        return 0
    if not dry_run:
        return run(list(plan.argv))
    try:
        rehearse(plan, parsers)
    except ValueError as error:
        return fail(name, str(error))
    print("dry run: nothing is done")
    return 0


def rehearse(plan: Command, parsers: Mapping[str, type]) -> Any:
    """What the command's own parser makes of it; ValueError for what it refuses."""
    import tyro

    name, *flags = plan.argv
    arguments = tyro.cli(
        parsers[name], args=flags, prog=f"megatron-patch {name}", config=(tyro.conf.FlagCreatePairsOff,)
    )
    arguments.validate()
    return arguments


# ------------------------------------------------------------------------------------------------------ what is printed


def report(title: str, rows: Iterable[tuple[str, ...]], plan: Command) -> str:
    """What was understood: a table, warnings, and the command."""
    warnings = [f"warning: {text}" for text in plan.warnings]
    return "\n".join([title, columns(rows), *warnings, "", f"$ {plan.line}"])


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as aligned columns."""
    rows = [tuple(row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    lines = (
        "  ".join([*(word.ljust(width) for word, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)


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


def _one_order(order: Order) -> str:
    rows = [(str(one.number), one.name, f"{one.rule.meaning}; {one.rule.rule}") for one in order.arguments]
    return f"order {order.word}: {order.counts} arguments\n{columns(rows)}"
