"""An estimate on the terminal: figures in sentences first, then the tree of components, memory, operations, savings.

The rows behind the tables (:func:`summary`, :func:`component_rows`, :func:`operation_rows`, …) hold plain strings and serve the
HTML page as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from scratchlm.machine import COMPILER
from scratchlm.resources.answer import HEAD
from scratchlm.resources.devices import Device

if TYPE_CHECKING:
    from rich.table import Table

    from scratchlm.resources.answer import Component, Estimate, OperationGroup

WIDTH = 110
COSTLIEST = 10

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_ITSELF = "(itself)"
_SHORT = {"forward": "fwd", "backward": "bwd", "optimizer": "opt"}


@dataclass(frozen=True)
class Target:
    """What an estimate was made for, beside the recipe.

    Attributes:
        device: its peaks are the roofs; None: nothing is known of any.
        memory_bytes: of the device, or as wished; None: unknown.
        price_per_hour: USD.
        price_origin: whose price that is.
        notes: what the reader should know, a sentence each.
    """

    device: Device | None = None
    memory_bytes: int | float | None = None
    price_per_hour: float | None = None
    price_origin: str = ""
    notes: tuple[str, ...] = ()

    def peak(self, dtype: str) -> float | None:
        """FLOP/s of products in `dtype`; None where unknown."""
        peaks: dict[str, float] = (
            {} if self.device is None else {str(k): v for k, v in self.device.peak_flops.items()}
        )
        return peaks.get(dtype)

    @property
    def bandwidth(self) -> float | None:
        """Bytes/s of the memory; None where unknown."""
        return None if self.device is None else self.device.memory_bandwidth


def si(value: float, unit: str = "") -> str:
    """Four digits and a decimal prefix: ``666.7 MB``, ``20.05 MFLOP``."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def seconds(value: float) -> str:
    """``4.75 ms``, ``2.85 s``, ``24.7 min``, ``3.2 h``, ``12.5 days``."""
    for size, unit in ((2 * 86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        shown = value / (86400 if unit == "days" else size)
        if value >= 0.9995 * size:  # what three digits would write as the next unit's 1
            return f"{shown:,.0f} {unit}" if shown >= 999.5 else f"{shown:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def money(value: float) -> str:
    """``0.003 USD``, ``1,558.30 USD``."""
    return f"{value:,.2f} USD" if value >= 1 else f"{value:.2g} USD"


def summary(estimate: Estimate, target: Target) -> list[tuple[str, str]]:
    """What it comes to: (what, sentence)."""
    e = estimate
    rest = [f"{e.params - e.embedding_params:,} without the embedding"]
    if e.active_params != e.params:
        rest.insert(0, f"{e.active_params:,} of them active for a token")
    both = e.forward_flops + e.backward_flops
    found = [
        ("parameters", f"{e.params:,}; {', '.join(rest)}"),
        (
            "FLOPs per token",
            f"{si(e.forward_flops)} forward + {si(e.backward_flops)} backward = {si(both)}; "
            f"by the formula {si(e.model_flops)}, by 6·N {si(e.six_n)}",
        ),
        ("a step", _step(e)),
        ("peak memory", f"{si(e.memory.peak, 'B')}, at {e.memory.moment}{_fits(e, target)}"),
        (
            "micro-batch",
            f"{si(max(0.0, e.fixed_bytes), 'B')} + {si(e.bytes_per_sequence, 'B')} per sequence{_largest(e, target)}",
        ),
        ("KV cache", _cache(e)),
    ]
    return found + (_times(e, target) if e.time is not None else [])


def _step(e: Estimate) -> str:
    parts = f"{e.accumulation} × " if e.accumulation > 1 else ""
    tokens = e.accumulation * e.micro_batch * e.length
    how = "compiled" if e.compiled else "eager"
    return f"{parts}{e.micro_batch:,} sequences × {e.length:,} tokens = {tokens:,} tokens, in {e.precision}, {how}"


def _fits(e: Estimate, target: Target) -> str:
    if target.memory_bytes is None:
        return ""
    inside = e.memory.peak <= target.memory_bytes
    return f"; {'fits' if inside else 'does not fit'} in {si(target.memory_bytes, 'B')}"


def _largest(e: Estimate, target: Target) -> str:
    if e.largest_micro_batch is None or target.memory_bytes is None:
        return ""
    if not e.largest_micro_batch:
        return f"; not one sequence fits in {si(target.memory_bytes, 'B')}"
    return f"; at most {e.largest_micro_batch:,} at once fit in {si(target.memory_bytes, 'B')}"


def _cache(e: Estimate) -> str:
    bounded = f" + {si(e.cache_bytes_bounded, 'B')} per sequence" if e.cache_bytes_bounded else ""
    longest = e.cache_bytes_per_token * e.length + e.cache_bytes_bounded
    return f"{e.cache_bytes_per_token:,} B per token{bounded}; {si(longest, 'B')} at {e.length:,} tokens, in {e.precision}"


def _times(e: Estimate, target: Target) -> list[tuple[str, str]]:
    assert e.time is not None
    phases = " + ".join(f"{seconds(spent)} {phase}" for phase, spent in e.time.by_phase.items())
    parts = f" (a micro-batch and the optimizer: {phases})" if e.accumulation > 1 else f" = {phases}"
    peak = target.peak(e.precision)
    share = "" if peak is None else f", {e.time.model_flops_per_second / peak:.1%} of the {e.precision} peak"
    found = [
        ("step time", f"{seconds(e.time.step)}{parts}, on {e.time.machine}"),
        (
            "speed",
            f"{e.time.tokens_per_second:,.0f} tokens/s; {si(e.time.model_flops_per_second, 'FLOP/s')}{share}",
        ),
        ("whole run", f"{e.steps:,} steps, {si(e.tokens)} tokens: {seconds(e.time.total)}"),
    ]
    if e.time.price is not None and target.price_per_hour is not None:
        origin = f", {target.price_origin}" if target.price_origin else ""
        found.append(("money", f"{money(e.time.price)} at {target.price_per_hour:g} USD/h{origin}"))
    return found


class Figures(NamedTuple):
    """What adds up along the tree.

    Attributes:
        params, active: parameters, and those of them that one token meets.
        forward, backward: FLOPs of products per trained token.
        weights, gradients, state: bytes of parameters, gradients and what the optimizer remembers.
        kept: bytes that the forward pass leaves for the backward pass.
        at_peak: bytes of activations and temporaries at the peak.
    """

    params: int = 0
    active: int = 0
    forward: float = 0.0
    backward: float = 0.0
    weights: int = 0
    gradients: int = 0
    state: int = 0
    kept: int = 0
    at_peak: int = 0

    @property
    def counts_something(self) -> bool:
        """Whether it belongs into the table of parameters and FLOPs."""
        return any(self[:4])

    @property
    def takes_memory(self) -> bool:
        """Whether it belongs into the table of bytes."""
        return any(self[4:])


@dataclass
class Node:
    """A module of the tree: its own figures, and those inside it.

    Attributes:
        name: the last part of its path.
        own: its own figures; None: it only holds others.
        inside: its modules.
        at_peak: bytes of its own activations and temporaries at the peak.
    """

    name: str
    own: Component | None = None
    inside: dict[str, Node] = field(default_factory=dict)
    at_peak: int = 0

    def figures(self) -> Figures:
        """With everything inside."""
        every = [self.itself(), *(node.figures() for node in self.inside.values())]
        return Figures(*(sum(column) for column in zip(*every, strict=True)))

    def itself(self) -> Figures:
        """Of its own."""
        own = self.own
        if own is None:
            return Figures(at_peak=self.at_peak)
        return Figures(
            own.params,
            own.active,
            own.forward,
            own.backward,
            own.weights,
            own.gradients,
            own.state,
            own.kept,
            self.at_peak,
        )


def tree(estimate: Estimate) -> Node:
    """The components as the model nests them, in the order they were met."""
    root = Node("model")

    def at(path: str) -> Node:
        node = root
        for name in path.replace(".*", "\0").split("."):  # a list and the number in it are one name: blocks.*
            name = name.replace("\0", ".*")
            node = node.inside.setdefault(name, Node(name))
        return node

    for component in estimate.components:
        at(component.path).own = component
    for path, alive in estimate.memory.by_component.items():
        at(path).at_peak = alive
    return root


@dataclass(frozen=True)
class ComponentRow:
    """One line of the tree.

    Attributes:
        branch: the lines that lead to it.
        name: what it is.
        copies: how many there are; empty: it only holds others.
        figures: of it and everything below it.
    """

    branch: str
    name: str
    copies: str
    figures: Figures

    def counts(self) -> list[str]:
        """As readable strings: parameters, those active, FLOPs forward and backward."""
        found = self.figures
        return [
            *(f"{count:,}" if count else "–" for count in (found.params, found.active)),
            *(si(flops) if flops else "–" for flops in (found.forward, found.backward)),
        ]

    def bytes(self) -> list[str]:
        """As readable strings: weights, gradients, optimizer state, kept for the backward pass, there at the peak."""
        return [si(size, "B") if size else "–" for size in self.figures[4:]]


def component_rows(estimate: Estimate, shown: Callable[[Figures], bool] = any) -> list[ComponentRow]:
    """The tree, root first, without the modules that are not `shown`. A module's figures are the sum of the rows right below it."""
    return list(_rows(tree(estimate), shown, "", ""))


def _rows(node: Node, shown: Callable[[Figures], bool], branch: str, below: str) -> Iterator[ComponentRow]:
    name = node.name
    while node.own is None and not node.at_peak and len(node.inside) == 1 and node.name != "model":
        node = next(iter(node.inside.values()))
        name += f".{node.name}"
    copies = "" if node.own is None or node.own.copies == 1 else f"{node.own.copies}"
    yield ComponentRow(branch, name, copies, node.figures())
    inside = list(node.inside.values())
    if inside:
        inside.insert(0, Node(_ITSELF, node.own, at_peak=node.at_peak))
    inside = [child for child in inside if shown(child.figures())]
    for child in inside:
        last = child is inside[-1]
        yield from _rows(child, shown, below + ("└ " if last else "├ "), below + ("  " if last else "│ "))


def memory_rows(estimate: Estimate) -> list[tuple[str, str, str]]:
    """(kind, bytes, share) at the peak, largest first; the last row is the peak."""
    peak = estimate.memory.peak
    found = [(kind, si(size, "B"), f"{size / peak:.1%}") for kind, size in estimate.memory.at_peak.items()]
    return [*found, ("peak", si(peak, "B"), "100.0%")]


def operation_rows(estimate: Estimate, target: Target, most: int = COSTLIEST) -> list[list[str]]:
    """The costliest groups of equal operations, all others in one row, and their sum.

    Returns:
        Rows of: phase, component, operation, calls, FLOP per trained token, bytes, FLOP per byte, and, where times are known, time, share of the
        time, share of the peak, what bounds it.
    """
    groups = estimate.operations
    whole = sum(group.seconds or 0.0 for group in groups)
    peak = target.peak(estimate.precision)
    found = [
        [group.phase, group.component or "–", group.name, *_costs([group], whole, peak, estimate)]
        for group in groups[:most]
    ]
    if groups[most:]:
        found.append(["", f"{len(groups) - most} others", "", *_costs(groups[most:], whole, peak, estimate)])
    return [*found, ["", "all", "", *_costs(groups, whole, peak, estimate)]]


def _costs(groups: Sequence[OperationGroup], whole: float, peak: float | None, estimate: Estimate) -> list[str]:
    flops, moved = sum(group.flops for group in groups), sum(group.moved for group in groups)
    cells = [
        f"{sum(group.calls for group in groups):,}",
        si(sum(map(estimate.flops_per_token, groups))) if flops else "–",
        si(moved, "B"),
        _ratio(flops / max(1, moved)) if flops else "–",
    ]
    if estimate.time is None:
        return cells
    spent = sum(group.seconds or 0.0 for group in groups)
    reached = f"{flops / spent / peak:.0%}" if peak and flops and spent else "–"
    bound = groups[0].bound or "" if len(groups) == 1 else ""
    return [*cells, seconds(spent), f"{spent / whole:.1%}" if whole else "–", reached, bound]


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def operation_headers(estimate: Estimate) -> list[str]:
    """What :func:`operation_rows` holds."""
    headers = ["phase", "component", "operation", "calls", "FLOP/token", "moved", "FLOP/B"]
    return headers if estimate.time is None else [*headers, "time", "share", "of peak", "bound"]


def saving_rows(estimate: Estimate) -> list[tuple[str, str, str]]:
    """(change, the peak with it, what that saves), most first."""
    peak = estimate.memory.peak
    found = sorted(estimate.savings.items(), key=lambda pair: pair[1])
    return [(name, si(size, "B"), f"{(peak - size) / peak:+.0%}".replace("-", "−")) for name, size in found]


def ridge(target: Target, dtype: str) -> float | None:
    """FLOPs per byte from which products, not memory, take the time; None where a figure is unknown."""
    peak, bandwidth = target.peak(dtype), target.bandwidth
    return peak / bandwidth if peak and bandwidth else None


def show(estimate: Estimate, target: Target) -> None:
    """Print all of it on standard output."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
    figures = _table("", ("", ""), (), header=False)
    figures.columns[1].no_wrap = False
    for what, sentence in summary(estimate, target):
        figures.add_row(Text(what, style="dim"), Text(sentence))
    console.print(Text(estimate.name, style="bold"))
    console.print(figures)
    for table in _components(estimate):
        console.print(table)
    console.print(_memory(estimate))
    console.print(_operations(estimate, target))
    if estimate.savings:
        saved = _table("peak memory with one thing changed, alone", ("change",), ("peak", "saved"))
        _fill(saved, saving_rows(estimate))
        console.print(saved)
    for line in remarks(estimate, target):
        console.print(Text(line, style="dim"))


def remarks(estimate: Estimate, target: Target) -> list[str]:
    """What the figures rest on, a sentence each."""
    point = ridge(target, estimate.precision)
    found = [] if estimate.time is None else [f"assumed: {line}" for line in estimate.time.assumptions]
    head = next((part for part in estimate.components if part.path == HEAD), None)
    if head is not None and head.forward and not head.backward:
        found.append("the chunked loss makes its gradients in the forward pass: their FLOPs stand there")
    if estimate.compiled and target.device is not None and target.device.kind == "cpu":
        found.append(f"the compiler itself takes up to {si(COMPILER, 'B')} of main memory besides, while it works")
    if point is not None and target.device is not None:
        found.append(
            f"{target.device.title} needs {point:,.0f} FLOP per byte in {estimate.precision} before products, not memory, "
            "bound an operation"
        )
    return [*found, *target.notes]


COUNTS = ("parameters", "active", "forward", "backward")
BYTES = ("weights", "gradients", "optimizer\nstate", "kept for\nbackward", "there at\nthe peak")
"""What :meth:`ComponentRow.counts` and :meth:`ComponentRow.bytes` hold."""


def _components(estimate: Estimate) -> Iterator[Table]:
    counts = _table("components; FLOPs of matrix products per trained token", ("component",), ("copies", *COUNTS))
    sizes = _table("bytes of the components; at the peak: activations and temporaries", ("component",), BYTES)
    for row in component_rows(estimate, lambda figures: figures.counts_something):
        counts.add_row(row.branch + row.name, row.copies, *row.counts(), style=_bold(row))
    for row in component_rows(estimate, lambda figures: figures.takes_memory):
        sizes.add_row(row.branch + row.name, *row.bytes(), style=_bold(row))
    yield counts
    yield sizes


def _bold(row: ComponentRow) -> str | None:
    return None if row.branch else "bold"


def _memory(estimate: Estimate) -> Table:
    table = _table(f"memory at the peak: {estimate.memory.moment}", ("kind",), ("bytes", "share"))
    *kinds, peak = memory_rows(estimate)
    _fill(table, kinds)
    table.add_row(*peak, style="bold")
    return table


def _operations(estimate: Estimate, target: Target) -> Table:
    headers = operation_headers(estimate)
    table = _table("costliest operations of a micro-batch, each by itself", headers[:3], headers[3:])
    table.padding = (0, 0)
    rows = [
        [_SHORT.get(phase, phase), _end(place), _beginning(name), *cells]
        for phase, place, name, *cells in operation_rows(estimate, target)
    ]
    *groups, every = rows
    _fill(table, groups)
    table.add_row(*every, style="bold")
    return table


def _table(title: str, left: Iterable[str], right: Iterable[str], *, header: bool = True) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title or None,
        title_justify="left",
        box=SIMPLE_HEAD if header else None,
        show_header=header,
        padding=(0, 1),
    )
    for name in left:
        # A long name loses its end, not the table its shape.
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _end(name: str, most: int = 23) -> str:
    """A long path is known by its end."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _beginning(name: str, most: int = 15) -> str:
    """A long operation is known by its beginning."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _fill(table: Table, rows: Iterable[Sequence[str]]) -> None:
    from rich.text import Text

    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
