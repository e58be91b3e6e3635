"""What torch.compile makes of a traced step's memory: which activations it keeps, and which tensors never come to be.

The blocks of a model are compiled as one graph, forward and backward together, before either runs. Two things change:

::

    eager       x ── norm ── cast ══ mm ── silu ── mul ══ mm          ─ a tensor of its own, kept if the backward pass asks for it
    compiled    x ────────── cast ══ mm ────────── mul ══ mm          ═ product: what goes in and comes out has to be in memory

- **Fusion.** What is made and used up between two products is computed in one loop and never written.
- **Recomputation.** What the backward pass asks for is kept, or computed again from what is kept. Products are never computed again, what a product of
  the backward pass reads is kept as it is, and for the rest a minimum cut through the graph says what is the least to keep.

The rules are those of torch's own partitioner (`torch/_functorch/partitioners.py`, `min_cut_rematerialization_partition`) in its default setting,
applied to the operations of the trace instead of a graph that a compiler would first have to make; a test holds the kept bytes to its own.
"""

from __future__ import annotations

import functools
import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from scratchlm.resources.trace import Operation, Storage, Trace

_NEVER_FUSED = frozenset(
    [
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "grouped_product",
        "grouped_outer",
        "swiglu",
        "swiglu_backward",
        "turn_heads",
        "turn_heads_backward",
        "embedding",
        "embedding_dense_backward",
        "cat",
        "sort",
        "topk",
        "cumsum",
        "bincount",
        "histc",
        "index_add",
        "index_add_",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "scatter",
        "scatter_",
        "scatter_add",
        "scatter_add_",
        "nonzero",
        "convolution",
        "convolution_backward",
        "bernoulli",
        "bernoulli_",
        "native_dropout",
        "rand",
        "rand_like",
        "uniform_",
        "multinomial",
    ]
)
"""Operations that the compiler runs by themselves or does not compute a second time, beside those that have FLOPs."""

_PASSING = ("activations", "temporaries")

FARTHEST = 100


def compiled(trace: Trace, *, fused_loss: bool) -> Trace:
    """The same step with the model's blocks compiled: the same operations, other storages.

    Args:
        trace: of an eager step.
        fused_loss: whether the pointwise part of the loss is compiled, too, as it is of the chunked one.
    """
    return _Compiled(trace, fused_loss).trace()


def kept_for_backward(trace: Trace) -> list[Storage]:
    """What the compiled blocks keep of their forward pass, without weights and tables."""
    graph = _Compiled(trace, fused_loss=True)
    return [trace.storages[n] for n in sorted(graph.saved) if n in graph.made]


def in_blocks(module: str) -> bool:
    """Whether a module is part of what is compiled: a block, or the last norm."""
    return module.partition(".")[0] in ("blocks", "norm")


class _Compiled:
    """The graph of a traced step's blocks: nodes are storages, and an operation leads from what it reads to what it writes."""

    def __init__(self, trace: Trace, fused_loss: bool) -> None:
        self.eager, self.fused_loss = trace, fused_loss
        self.forward = [
            i for i, op in enumerate(trace.operations) if op.phase == "forward" and in_blocks(op.module)
        ]
        self.backward = [
            i for i, op in enumerate(trace.operations) if op.phase == "backward" and in_blocks(op.module)
        ]
        self.parents: dict[int, set[int]] = defaultdict(set)
        self.made: set[int] = set()
        self.readers: dict[int, list[int]] = defaultdict(list)  # operations of the forward pass
        for i in self.forward:
            operation = trace.operations[i]
            for number in operation.inputs:
                self.readers[number].append(i)
            for number in operation.outputs:
                self.parents[number].update(n for n in operation.inputs if n != number)
                if trace.storages[number].born == i:
                    self.made.add(number)
        self.needed: dict[int, list[int]] = defaultdict(list)  # storage → operations of the backward pass
        for i in self.backward:
            for number in trace.operations[i].inputs:
                if number in self.made or number in self.readers:
                    self.needed[number].append(i)
        self.children: dict[int, set[int]] = defaultdict(set)
        for number, parents in self.parents.items():
            for parent in parents:
                self.children[parent].add(number)
        self.banned = self._banned()
        self.saved = self._saved()
        self._known_sources: dict[int, set[int]] = {}

    # --- what is kept ------------------------------------------------------------------------------------------------

    def _banned(self) -> set[int]:
        """What is never computed a second time: what comes in, and what one of the partitioner's rules forbids."""
        trace = self.eager
        banned = {n for n in (*self.readers, *self.needed) if n not in self.made}
        for number in self.made:
            storage, maker = trace.storages[number], trace.operations[trace.storages[number].born]
            read = sum(trace.storages[n].size for n in self.parents[number])
            if (
                not is_fusible(maker)
                or any(not is_fusible(trace.operations[i]) for i in self.needed.get(number, ()))
                or 4 * storage.size < read  # a reduction's result is cheap to keep
            ):
                banned.add(number)
        for number in self.made:
            if is_fusible(trace.operations[trace.storages[number].born]):
                banned |= self._far_away(
                    [i for i in self.readers[number] if number not in trace.operations[i].outputs]
                )
        # One constant −inf serves all masks of the graph, and so only the first of them is near to it.
        return banned | self._far_away([i for i in self.forward if trace.operations[i].name == "masked_fill"])

    def _far_away(self, users: list[int]) -> set[int]:
        """What those make of one tensor that come behind the first product after it: such as the residual stream behind a sublayer."""
        operations = self.eager.operations
        if len(users) < 2:
            return set()
        waiting, seen, first = sorted(users), set(users), max(users)
        while waiting:
            i = heapq.heappop(waiting)
            if not is_fusible(operations[i]):
                first = i
                break
            for reader in (reader for made in operations[i].outputs for reader in self.readers[made]):
                if reader not in seen and reader <= max(users):
                    seen.add(reader)
                    heapq.heappush(waiting, reader)
        return {n for i in users if i > first and is_fusible(operations[i]) for n in operations[i].outputs}

    def _saved(self) -> set[int]:
        saved = {n for n in self.needed if n in self.banned}
        for part in self._parts():
            if any(n in self.needed and n not in self.banned for n in part):
                saved |= self._cut(part)
        return saved

    def _parts(self) -> Iterator[set[int]]:
        """The graph falls apart where nothing is computed again: each part is what can be, and what it can be computed from."""
        free, done = self.made - self.banned, set[int]()
        for start in sorted(free):
            if start in done:
                continue
            part, waiting = set[int](), [start]
            while waiting:
                number = waiting.pop()
                if number in part:
                    continue
                part.add(number)
                if number in self.banned:
                    continue
                waiting += [*self.parents[number], *(n for n in self.children[number] if n not in self.banned)]
            done |= part & free
            yield part

    def _cut(self, part: set[int]) -> set[int]:
        """The cheapest storages of a part from which all that is needed of it can be computed."""
        flow = Flow()
        for number in part:
            flow.add(("in", number), ("out", number), self._price(number))
            if number in self.banned:
                flow.add("source", ("in", number), float("inf"))
            else:
                for parent in self.parents[number]:
                    flow.add(("out", parent), ("in", number), float("inf"))
            if number in self.needed:
                flow.add(("out", number), "sink", float("inf"))
        behind = flow.behind_the_cut("source", "sink")
        return {n for n in part if ("in", n) not in behind and ("out", n) in behind}

    def _price(self, number: int) -> float:
        """Bytes; dearer the farther from the backward pass, and twice for what would not be in memory otherwise. Weights are there."""
        storage, operations = self.eager.storages[number], self.eager.operations
        if storage.kind == "weights":
            return 0.0
        far = 1.1 ** max(1, min(self._distance(number), FARTHEST))
        if number in self.made and all(is_fusible(operations[i]) for i in self.readers[number]):
            return 2 * far * storage.size
        return far * storage.size

    @functools.cached_property
    def _distances(self) -> dict[int, int]:
        found = dict.fromkeys(self.needed, 1)
        waiting = deque(self.needed)
        while waiting:
            number = waiting.popleft()
            for parent in self.parents[number]:
                if parent not in found:
                    found[parent] = found[number] + 1
                    waiting.append(parent)
        return found

    def _distance(self, number: int) -> int:
        return self._distances.get(number, FARTHEST)

    # --- when it is there --------------------------------------------------------------------------------------------

    def trace(self) -> Trace:
        """The operations as they are, and the storages that there are then, with their lives."""
        self._stretch = self._stretches()
        self._absent = {s.number for s in self.eager.storages if self._never_written(s)}
        last, end = self._last_uses(), self.backward[-1] + 1 if self.backward else 0
        found = []
        for storage in self.eager.storages:
            number, died, kind = storage.number, storage.died, storage.kind
            if number in self._absent:
                continue
            inside = storage.born in self._stretch and all(i in self._stretch for i in self._uses[number])
            if kind in _PASSING and (inside or number in self.needed):
                died = last[number] + 1
            if number in self.made and kind == "activations" and number not in self.saved:
                kind = "temporaries"
            if self._is_added_up(storage):
                died = end
            found.append(replace(storage, died=died, kind=kind))
        return Trace(self.eager.operations, found)

    def _stretches(self) -> dict[int, int]:
        """Operation → number of its stretch between two products; operations outside of compiled code are in none."""
        found: dict[int, int] = {}
        number, before = 0, ""
        for i, operation in enumerate(self.eager.operations):
            at_head = self.fused_loss and in_head(operation)
            place = (
                f"head {operation.phase}"
                if at_head
                else f"blocks {operation.phase}"
                if in_blocks(operation.module)
                else ""
            )
            fusible = is_fusible(operation)
            if place != before or not fusible:
                number += 1
            before = place if fusible else ""
            if (
                place and operation.phase != "optimizer" and (fusible or not at_head)
            ):  # the head's products are not compiled
                found[i] = number
        return found

    @functools.cached_property
    def _uses(self) -> dict[int, list[int]]:
        """Storage → the operations that read or write it."""
        found: dict[int, list[int]] = defaultdict(list)
        for i, operation in enumerate(self.eager.operations):
            for number in {*operation.inputs, *operation.outputs}:
                found[number].append(i)
        return found

    def _never_written(self, storage: Storage) -> bool:
        """Whether it is made and used up within one stretch, or only computed again in the backward pass."""
        if storage.kind not in _PASSING or storage.number in self.saved or storage.born not in self._stretch:
            return False
        uses = [
            i for i in self._uses[storage.number] if storage.number not in self.made or i < self._first_backward
        ]
        return all(
            self._stretch.get(i) == self._stretch[storage.born] and is_fusible(self.eager.operations[i])
            for i in uses
        )

    @property
    def _first_backward(self) -> int:
        return self.backward[0] if self.backward else len(self.eager.operations)

    def _last_uses(self) -> dict[int, int]:
        """Storage → the last operation that reads it, be it to compute something again, or for a result that is written later."""
        operations = self.eager.operations
        written = list(
            range(len(operations))
        )  # operation → where its results, or what is made of them at once, are written
        for i in reversed(range(len(operations))):
            made = operations[i].outputs
            if i in self._stretch and made and all(n in self._absent for n in made):
                written[i] = max(
                    (written[j] for n in made for j in self._uses[n] if j > i and j in self._stretch), default=i
                )
        last: dict[int, int] = defaultdict(int)
        in_backward = set(self.backward)
        for i, operation in enumerate(operations):
            for number in (*operation.inputs, *operation.outputs):
                sources = self._sources(number) if number in self.needed and i in in_backward else (number,)
                for source in sources:
                    last[source] = max(last[source], written[i])
        return last

    def _sources(self, number: int) -> set[int]:
        """The kept storages that one is computed from; itself, if it is kept."""
        if number not in self._known_sources:
            self._known_sources[number] = self._sources_of(number)
        return self._known_sources[number]

    def _sources_of(self, number: int) -> set[int]:
        found, waiting, seen = set[int](), [number], set[int]()
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            if at in self.saved or at not in self.made:
                found.add(at)
            else:
                waiting += self.parents[at]
        return found

    def _is_added_up(self, storage: Storage) -> bool:
        """A gradient that is added to the sum of former micro-batches: compiled code hands out all of them together at its end."""
        if storage.phase != "backward" or storage.kind not in _PASSING or not in_blocks(storage.module):
            return False
        storages, operations = self.eager.storages, self.eager.operations
        written = {n for i in self._uses[storage.number] for n in operations[i].outputs}
        return any(storages[n].kind == "gradients" and storages[n].phase != "backward" for n in written)


def in_head(operation: Operation) -> bool:
    """Whether it is the head's or the loss's, in the forward pass: a chunked loss has no other."""
    return operation.phase == "forward" and operation.module in ("", "head")


def is_fusible(operation: Operation) -> bool:
    """Whether the compiler can compute it in one loop with its neighbours."""
    return not operation.flops and operation.name not in _NEVER_FUSED


class Flow:
    """The largest flow through a small network, and with it the smallest cut (Edmonds and Karp 1972)."""

    def __init__(self) -> None:
        self.left: dict[object, dict[object, float]] = defaultdict(dict)

    def add(self, start: object, end: object, capacity: float) -> None:
        self.left[start][end] = self.left[start].get(end, 0.0) + capacity
        self.left[end].setdefault(start, 0.0)

    def behind_the_cut(self, source: object, sink: object) -> set[object]:
        """The nodes from which the sink can still be reached when no more can flow."""
        while (path := self._path(source, sink)) is not None:
            most = min(self.left[a][b] for a, b in path)
            if most == float("inf"):
                raise ValueError("something is needed that can be neither kept nor computed again")
            for a, b in path:
                self.left[a][b] -= most
                self.left[b][a] += most
        behind, waiting = {sink}, [sink]
        while waiting:
            node = waiting.pop()
            for other in self.left[node]:
                if self.left[other].get(node, 0.0) > 0 and other not in behind:
                    behind.add(other)
                    waiting.append(other)
        return behind

    def _path(self, source: object, sink: object) -> list[tuple[object, object]] | None:
        came: dict[object, object] = {source: source}
        waiting = deque([source])
        while waiting:
            node = waiting.popleft()
            for other, capacity in self.left[node].items():
                if capacity > 0 and other not in came:
                    came[other] = node
                    if other == sink:
                        return list(self._back(came, sink, source))
                    waiting.append(other)
        return None

    @staticmethod
    def _back(came: dict[object, object], node: object, source: object) -> Iterable[tuple[object, object]]:
        while node != source:
            yield came[node], node
            node = came[node]
