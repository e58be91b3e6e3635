"""Measuring: what is timed and how, the time of products nobody measured, and where a measurement is kept."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.cli import main
from scratchlm.errors import UserError
from scratchlm.resources import measure as bench
from scratchlm.resources.devices import cache_sizes, this_machine
from scratchlm.resources.measure import FULL, QUICK, Plan, measure
from scratchlm.resources.measurement import (
    Attention,
    Measurement,
    Product,
    Transfer,
    default_path,
    load_measurement,
    machine_title,
    refuse_other_file,
    store,
)
from scratchlm.resources.utilisation import Utilisation

CPU = torch.device("cpu")
TINY = Plan(
    shapes=((64, 64, 64), (8, 16, 32), (4096, 4096, 4096)),
    working_sets=(2**12, 2**18),
    tensor_bytes=(2**13,),
    lengths=(16, 32),
    tokens=32,
    rounds=4,
    seconds=2.0,
    slowest=0.02,
    shortest=0.0002,
    quick=True,
)


@pytest.fixture(scope="module")
def tiny() -> Measurement:
    return measure(CPU, ["bf16", "fp32"], TINY)


# What is measured


def test_everything_of_the_plan_is_measured(tiny: Measurement) -> None:
    assert (tiny.machine, tiny.device, tiny.quick) == (machine_title(CPU), "cpu", True)
    assert tiny.dtypes == ("bf16", "fp32")
    shapes = {(p.m, p.n, p.k, p.dtype) for p in tiny.products if p.routine == "torch"}
    assert shapes == {
        (m, n, k, d) for m, n, k in TINY.shapes[:2] for d in ("bf16", "fp32")
    }  # the third is too slow
    assert [(t.operation, t.working_set) for t in tiny.transfers] == [
        (operation, size) for size in TINY.working_sets for operation in ("read", "copy")
    ]
    passes = {(e.operation, e.dtype) for e in tiny.elementwise}
    assert passes == set(itertools.product(("add", "exp", "silu", "softmax", "layer_norm"), ("bf16", "fp32")))
    assert {(a.length, a.heads, a.dtype, a.direction) for a in tiny.attention} == {
        (length, 8 * 32 // length, dtype, direction)
        for length in (16, 32)
        for dtype in ("bf16", "fp32")
        for direction in ("forward", "forward+backward")
    }
    for timing in (*tiny.products, *tiny.transfers, *tiny.elementwise, *tiny.attention):
        assert timing.rounds >= 3 and timing.spread >= 0
        assert 1e-8 < timing.seconds < 1
    assert 1e-8 < tiny.call_seconds < 0.01
    assert tiny.environment["threads"] == tiny.threads
    assert tiny.threads == torch.get_num_threads()


def test_what_is_counted(tiny: Measurement) -> None:
    """FLOPs and bytes against torch's own counter and against sizes."""
    for product in tiny.products:
        assert product.flops_per_second * product.seconds == pytest.approx(2 * product.m * product.n * product.k)
    add, exp = (
        next(e for e in tiny.elementwise if (e.operation, e.dtype) == (name, "bf16")) for name in ("add", "exp")
    )
    assert (add.tensor_bytes, add.moved, exp.moved) == (8192, 3 * 8192, 2 * 8192)
    copy = next(t for t in tiny.transfers if t.operation == "copy")
    assert (copy.working_set, copy.moved) == (4096, 4096)
    read = next(t for t in tiny.transfers if t.operation == "read")
    assert (read.working_set, read.moved) == (4096, 4096 * 512)
    for attention in tiny.attention:
        q = torch.ones(1, attention.heads, attention.length, attention.head_dim, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            q @ q.mT @ q  # the two products of attention, of all length² scores
        factor = {"forward": 1, "forward+backward": 3}[attention.direction]
        counted = attention.flops_per_second * attention.seconds
        assert counted == pytest.approx(factor * counter.get_total_flops())


def test_a_ceiling_is_the_best_median(tiny: Measurement) -> None:
    rates = [p.flops_per_second for p in tiny.products if p.dtype == "fp32"]
    assert tiny.ceiling("fp32") == max(rates)
    largest = [t.bytes_per_second for t in tiny.transfers if t.working_set == 2**18]
    assert tiny.bandwidth == max(largest)
    with pytest.raises(UserError, match=r"products in fp16 were not measured .*bf16, fp32"):
        tiny.ceiling("fp16")


def test_nothing_is_left_changed() -> None:
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    try:
        measure(CPU, ["fp32"], TINY)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(usual)
    assert torch.equal(torch.get_rng_state(), before)


def test_slow_shapes_are_left_out_before_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run: set[tuple[int, ...]] = set()

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        run.add((*x.shape, weight.shape[0]))
        return x @ weight.T

    monkeypatch.setattr(bench, "_routines", lambda device, dtype: {"torch": linear})
    measured = measure(CPU, ["fp32"], TINY)
    assert run == {(8, 32, 16), (64, 64, 64)}  # the small one first, though it stands second
    assert [(p.m, p.n, p.k) for p in measured.products] == [(8, 16, 32), (64, 64, 64)]


def test_onednn_is_measured_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "onednn_beats_mkl", lambda: True)
    assert list(bench._routines(CPU, "fp32")) == ["torch", "onednn"]
    assert list(bench._routines(CPU, "bf16")) == ["torch"]
    monkeypatch.setattr(bench, "onednn_beats_mkl", lambda: False)
    assert list(bench._routines(CPU, "fp32")) == ["torch"]


def test_the_plans() -> None:
    for plan in (FULL, QUICK, FULL.on_a_gpu(), QUICK.on_a_gpu()):
        assert len(set(plan.shapes)) == len(plan.shapes)
        assert all(size % 4 == 0 for size in plan.working_sets)
        assert all(plan.tokens % length == 0 for length in plan.lengths)
    assert (min(FULL.working_sets), max(FULL.working_sets)) == (32 * 2**10, 512 * 2**20)
    assert {(2048, 4096, 1024), (8192, 8192, 8192), (512, 128, 128)} <= set(FULL.shapes)
    assert len(QUICK.shapes) < len(FULL.shapes) / 2
    assert set(FULL.shapes) < set(FULL.on_a_gpu().shapes) and FULL.on_a_gpu().tokens == 2**16


@pytest.mark.parametrize(
    ("device", "dtypes", "message"),
    [
        (CPU, ["fp8"], "dtype 'fp8' cannot be measured; did you mean"),
        (CPU, ["tf32"], "tf32 is a way in which NVIDIA's GPUs multiply fp32"),
        (torch.device("meta"), None, "device meta cannot be measured"),
    ],
)
def test_what_cannot_be_measured(device: torch.device, dtypes: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(device, dtypes, TINY)


# How it is timed, by a clock that only the tasks move


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)

    def task(self, name: str, *seconds: float) -> bench._Task:
        """One that takes `seconds` in turn, and then as long as the last time."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return bench._Task(run, {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def timer(**changes: Any) -> bench._Bench:
    values = {name: getattr(TINY, name) for name in Plan.__dataclass_fields__} | changes
    return bench._Bench(CPU, Plan(**values), show=False)


def test_operands_come_back_when_all_others_were_used() -> None:
    cold = bench._Cold(4 * 30)  # room for thirty numbers
    buffer = torch.arange(100.0)
    pieces = cold.pieces(buffer, 2, 5)
    given = [next(pieces) for _ in range(7)]
    assert [piece[0, 0].item() for piece in given] == [0, 10, 20, 0, 10, 20, 0] and given[0].shape == (2, 5)
    large = cold.pieces(buffer, 60)
    assert next(large).numel() == 60 and next(large)[0] == 0, "more than the caches: always the same"


def test_results_are_kept_until_as_many_bytes_followed() -> None:
    cold = bench._Cold(100)
    for number in range(10):
        cold.keep(torch.full((10,), float(number)))  # 40 bytes
    assert [kept[0].item() for kept in cold._results] == [8, 9]
    cold.keep(torch.zeros(50))
    assert not cold._results, "what is larger than all caches need not be kept"
    cold.keep(torch.zeros(5))
    cold.clear()
    assert not cold._results and cold._held == 0


def test_rounds_are_interleaved(clock: Clock) -> None:
    tasks = [clock.task("a", 1.0), clock.task("b", 2.0)]
    timer(rounds=3, seconds=100).rounds(tasks, "test")
    assert "".join(clock.calls) == "ababab"
    assert [task.timings for task in tasks] == [[1.0] * 3, [2.0] * 3]


def test_a_phase_ends_after_its_time_but_not_before_three_rounds(clock: Clock) -> None:
    short, long = [clock.task("a", 1.0)], [clock.task("a", 1.0)]
    timer(rounds=9, seconds=0.5).rounds(short, "test")
    timer(rounds=9, seconds=4.5).rounds(long, "test")
    assert (len(short[0].timings), len(long[0].timings)) == (3, 5)


def test_short_calls_are_repeated_and_long_ones_are_not(clock: Clock) -> None:
    short, long = clock.task("a", 9.0, 2**-10), clock.task("b", 9.0, 1.0)  # the first call of each is a slow one
    assert timer(shortest=2**-6).warm_up(short) == 2**-10
    assert short.repeats == 16
    assert timer().time(short) == 2**-10
    assert timer(shortest=2**-6).warm_up(long) == 1.0
    assert long.repeats == 1


def test_median_and_spread() -> None:
    assert bench._summary([5.0, 1.0, 3.0, 2.0, 4.0]) == {
        "seconds": 3.0,
        "spread": pytest.approx(2 / 3),
        "rounds": 5,
    }
    assert bench._summary([2.0]) == {"seconds": 2.0, "spread": 0.0, "rounds": 1}


# The time of products nobody measured, on a machine whose times are a formula


def synthetic(seconds: Callable[[int, int, int], float], skip: tuple[int, int, int] | None = None) -> Measurement:
    shapes = [shape for shape in FULL.shapes if math.prod(shape) < 2e10 and shape != skip]
    timing = {"spread": 0.0, "rounds": 3}
    return Measurement(
        machine="synthetic", device="cpu", date="2026-11-21T00:00:00+00:00", quick=False, seconds=1.0, threads=1,
        memory_bytes=None, caches=None, call_seconds=2e-6, elementwise=(), attention=(), environment={},
        products=tuple(
            Product(m=m, n=n, k=k, dtype="fp32", routine="torch", seconds=seconds(m, n, k), **timing)
            for m, n, k in shapes
        ),
        transfers=tuple(
            Transfer(operation="copy", working_set=size, moved=size, seconds=size / (8e10 if size < 2**25 else 2e10), **timing)
            for size in FULL.working_sets
        ),
    )  # fmt: skip


def machine(m: int, n: int, k: int) -> float:
    """A call, products that small sizes slow down, and traffic."""
    efficiency = m / (m + 60) * n / (n + 90) * k / (k + 40)
    return 3e-6 + 2 * m * n * k / (1.5e11 * efficiency) + 4 * (m * k + k * n + m * n) / 3e10


MEASURED = synthetic(machine)
SHAPES = [(p.m, p.n, p.k) for p in MEASURED.products]


@given(st.sampled_from(SHAPES))
def test_a_measured_shape_has_its_measured_time(shape: tuple[int, int, int]) -> None:
    assert MEASURED.seconds_of_product(*shape, "fp32") == machine(*shape)


@settings(max_examples=200)
@given(st.integers(512, 8192), st.integers(128, 4096), st.integers(128, 4096))
def test_between_measured_shapes(m: int, n: int, k: int) -> None:
    assert MEASURED.seconds_of_product(m, n, k, "fp32") == pytest.approx(machine(m, n, k), rel=0.15)


def test_a_shape_left_out_is_foretold() -> None:
    errors = []
    for shape in SHAPES:
        left_out = synthetic(machine, skip=shape)
        errors.append(abs(left_out.seconds_of_product(*shape, "fp32") / machine(*shape) - 1))
    assert sorted(errors)[len(errors) // 2] < 0.05
    assert sorted(errors)[-3] < 0.3  # the smallest ones lie at the edge, with measured shapes on one side alone


def test_the_first_guess() -> None:
    """2mnk at the ceiling, three matrices of fp32 through the memory that holds so many bytes, and a call."""
    ceiling = MEASURED.ceiling("fp32")
    small = 2 * 100 * 200 * 300 / ceiling + 4 * (100 * 300 + 300 * 200 + 100 * 200) / 8e10 + 2e-6
    assert MEASURED._guess(100, 200, 300, "fp32", ceiling) == pytest.approx(small)
    large = 2 * 50_000**3 / ceiling + 4 * 3 * 50_000**2 / 2e10 + 2e-6
    assert MEASURED._guess(50_000, 50_000, 50_000, "fp32", ceiling) == pytest.approx(large)


def test_better_than_flops_alone() -> None:
    """What the interpolation is for: a narrow product runs far below the ceiling."""
    shape = (700, 160, 130)
    by_flops = 2 * math.prod(shape) / MEASURED.ceiling("fp32")
    truth = machine(*shape)
    assert abs(math.log(MEASURED.seconds_of_product(*shape, "fp32") / truth)) < 0.15 * abs(
        math.log(by_flops / truth)
    )


@given(st.integers(1, 30_000), st.integers(1, 30_000), st.integers(1, 30_000), st.floats(0.1, 10))
def test_a_slower_machine_is_slower_everywhere(m: int, n: int, k: int, factor: float) -> None:
    slower = synthetic(lambda *shape: factor * machine(*shape)).model_copy(
        update={
            "call_seconds": factor * MEASURED.call_seconds,
            "transfers": tuple(t.model_copy(update={"seconds": factor * t.seconds}) for t in MEASURED.transfers),
        }
    )
    expected = factor * MEASURED.seconds_of_product(m, n, k, "fp32")
    assert slower.seconds_of_product(m, n, k, "fp32") == pytest.approx(expected, rel=1e-9)


def test_far_from_everything_measured() -> None:
    """Large products run at the ceiling, and the smallest take a call."""
    huge = MEASURED.seconds_of_product(100_000, 50_000, 50_000, "fp32")
    assert huge == pytest.approx(2 * 100_000 * 50_000**2 / MEASURED.ceiling("fp32"), rel=0.1)
    assert 1e-6 < MEASURED.seconds_of_product(1, 1, 1, "fp32") < 1e-5


def test_products_that_are_none() -> None:
    with pytest.raises(UserError, match="sizes are at least 1"):
        MEASURED.seconds_of_product(1, 0, 1, "fp32")
    with pytest.raises(UserError, match="no product in bf16 by torch was measured on synthetic"):
        MEASURED.seconds_of_product(1, 1, 1, "bf16")
    with pytest.raises(UserError, match="no product in fp32 by onednn"):
        MEASURED.seconds_of_product(1, 1, 1, "fp32", "onednn")


def test_bandwidth_within() -> None:
    assert MEASURED.bandwidth_within(1) == pytest.approx(8e10)
    assert MEASURED.bandwidth_within(2**23) == pytest.approx(8e10)
    assert MEASURED.bandwidth_within(2**24) == pytest.approx(4e10)  # half-way between 8 and 32 MiB, in logarithms
    assert MEASURED.bandwidth_within(2**40) == pytest.approx(MEASURED.bandwidth) == pytest.approx(2e10)


# Where it is kept


def test_there_and_back(tiny: Measurement, tmp_path: Path) -> None:
    path = tmp_path / "new" / "device.json"
    assert store(tiny, path) is None
    assert load_measurement(path) == tiny
    later = tiny.model_copy(update={"date": "2027-01-01T00:00:00+00:00"})
    assert store(later, path) == path.with_name("device.json.previous")
    assert load_measurement(path) == later
    assert load_measurement(path.with_name("device.json.previous")) == tiny
    assert {file.name for file in path.parent.iterdir()} == {"device.json", "device.json.previous"}


def damage(values: dict[str, Any], *keys: Any, to: Any) -> str:
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return json.dumps(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: "[]", "is of another kind"),
        (lambda text: '{"loss": 3}', "is of another kind"),
        (lambda text: damage(json.loads(text), "format", to=0), "of another version of scratchlm"),
        (lambda text: damage(json.loads(text), "products", to=[]), "is empty"),
        (lambda text: damage(json.loads(text), "products", 0, "seconds", to=-1.0), "products.0.seconds = -1.0"),
        (lambda text: damage(json.loads(text), "call_seconds", to=float("nan")), "call_seconds = nan"),
        (lambda text: damage(json.loads(text), "colour", to="red"), "unknown field colour"),
    ],
)
def test_a_damaged_file(tiny: Measurement, tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    path = tmp_path / "device.json"
    store(tiny, path)
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_measurement(path)
    with pytest.raises(UserError, match=r"is no measurement that can be read .* move it away"):
        refuse_other_file(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no measurement .*none.json; run `scratchlm resources measure`"):
        load_measurement(tmp_path / "none.json")
    refuse_other_file(tmp_path / "none.json")


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "scratchlm" / "device.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for none in ("", "relative"):  # the specification ignores a relative one
        monkeypatch.setenv("XDG_CACHE_HOME", none)
        assert default_path() == tmp_path / "home" / ".cache" / "scratchlm" / "device.json"


def test_this_machine_is_as_measured(tiny: Measurement, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store(tiny, default_path())
    found = this_machine(CPU)
    assert (found.name, found.title, found.measured) == ("cpu", tiny.machine, tiny.date)
    assert found.peak("fp32") == tiny.ceiling("fp32")
    assert found.memory_bandwidth == tiny.bandwidth
    assert (
        found.sources["peak_flops.bf16"] == f"measured {tiny.date[:10]} on {tiny.machine}, {tiny.threads} threads"
    )
    used = Utilisation.on(found, "fp32", tiny.ceiling("fp32") / 4)
    assert (used.of_measured, used.of_datasheet) == (0.25, None)


def test_another_machines_measurement_is_not_this_ones(
    tiny: Measurement, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for other in ({"machine": "another CPU"}, {"device": "cuda"}):
        store(tiny.model_copy(update=other), default_path())
        assert this_machine(CPU).measured is None
    elsewhere = tmp_path / "elsewhere.json"
    store(tiny.model_copy(update={"machine": "another CPU"}), elsewhere)
    assert this_machine(CPU, elsewhere).title == "another CPU"  # asked for by name
    default_path().write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not valid JSON"):
        this_machine(CPU)


def test_cache_sizes(tmp_path: Path) -> None:
    caches = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "32M")]
    for index, facts in enumerate(caches):
        (tmp_path / f"index{index}").mkdir()
        for name, value in zip(("level", "type", "size"), facts, strict=True):
            (tmp_path / f"index{index}" / name).write_text(f"{value}\n", encoding="ascii")
    (tmp_path / "index9").mkdir()  # without files
    assert cache_sizes(tmp_path) == {"L1d": 48 * 2**10, "L2": 2**20, "L3": 32 * 2**20}
    assert cache_sizes(tmp_path / "none") is None


# The command


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "QUICK", TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["resources", "measure", "--quick", "--device", "cpu", "--dtypes", "fp32"]
    assert main(command) == 0
    first = load_measurement()
    printed = capfd.readouterr().out
    assert f"stored in {default_path()}" in printed and "former" not in printed
    assert "64 × 64 × 64" in printed and "4 KiB" in printed and "layer_norm fp32" in printed
    assert main([*command, "--json"]) == 0
    assert Measurement(**json.loads(capfd.readouterr().out)) == load_measurement()
    assert main(command) == 0
    previous = f"{default_path()}.previous"
    assert (
        f"the former measurement, of this machine on {first.date[:10]}, is kept in {previous}"
        in capfd.readouterr().out
    )


def test_the_command_keeps_other_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"mine": 1}', encoding="utf-8")
    assert main(["resources", "measure", "--quick", "--out", str(path)]) == 2
    assert "is no measurement that can be read" in capfd.readouterr().err
    assert path.read_text(encoding="utf-8") == '{"mine": 1}'


@pytest.mark.parametrize("ours", [True, False])
def test_the_backward_pass_of_what_training_takes_is_run(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction computes no gradients, the other does, of our attention where training takes it and of torch's elsewhere."""
    forwards, backwards = [], []
    theirs, own = F.scaled_dot_product_attention, bench.flash_attention_op.fused_attention

    def watched(result: torch.Tensor, whose: str) -> torch.Tensor:
        forwards.append(whose)
        result.register_hook(lambda _: backwards.append(whose))
        return result

    def torchs(*given: Any, is_causal: bool) -> torch.Tensor:
        assert is_causal
        return watched(theirs(*given, is_causal=is_causal), "torch's")

    monkeypatch.setattr(bench.F, "scaled_dot_product_attention", torchs)
    monkeypatch.setattr(bench.flash_attention_op, "fused_attention", lambda *given: watched(own(*given), "ours"))
    monkeypatch.setattr(bench.flash_attention_cpp, "is_the_way", lambda *_: ours)
    results = bench._attention(timer(lengths=(16,), tokens=16, rounds=1), ("fp32",))
    assert set(forwards) == set(backwards) == {"ours" if ours else "torch's"}
    assert 0 < len(backwards) < len(forwards)
    assert all(isinstance(result, Attention) for result in results)
