"""Devices: the figures their makers print, each with its source; names; one's own file; the machine at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scratchlm.cli import main
from scratchlm.errors import UserError
from scratchlm.resources import devices
from scratchlm.resources.devices import DTYPES, FIGURES, Device, find, known, load_devices, match, this_machine

DEVICES = known()


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_figure_has_a_source_and_is_possible(device: Device) -> None:
    figures = {f"peak_flops.{dtype}" for dtype in device.peak_flops}
    figures |= {name for name in FIGURES if getattr(device, name) is not None}
    assert set(device.sources) == figures
    assert all(len(source) > 8 for source in device.sources.values())
    assert (device.price_per_hour is None) == (device.price_date is None)
    assert (device.interconnect is None) == (device.interconnect_name is None)
    if device.price_per_hour is not None:
        assert "assumption" in device.sources["price_per_hour"]
        assert 0.05 < device.price_per_hour < 20
    peaks = device.peak_flops
    order = [peaks[dtype] for dtype in ("fp32", "tf32", "bf16", "fp8") if dtype in peaks]
    assert order == sorted(order)
    if "bf16" in peaks and "fp16" in peaks:
        assert peaks["bf16"] == peaks["fp16"]
    if "bf16" in peaks and "fp8" in peaks:
        assert peaks["fp8"] == pytest.approx(2 * peaks["bf16"], rel=0.02)
    if "bf16" in peaks and "tf32" in peaks and not device.name.startswith("rtx"):
        assert peaks["bf16"] == pytest.approx(2 * peaks["tf32"], rel=0.03)


@pytest.mark.parametrize(
    ("name", "figure", "value"),
    [
        ("h100-sxm", "bf16", 989.4e12),
        ("h100-sxm", "fp8", 1978.9e12),
        ("h100-sxm", "memory_bandwidth", 3.35e12),
        ("h100-sxm", "memory_bytes", 80e9),
        ("h100-sxm", "interconnect", 450e9),
        ("h100-pcie", "memory_bandwidth", 2.0e12),
        ("h200", "memory_bytes", 141e9),
        ("h200", "memory_bandwidth", 4.8e12),
        ("b200", "bf16", 2.25e15),
        ("b200", "memory_bandwidth", 7.7e12),
        ("b200", "fp32", 75e12),
        ("a100-40gb", "memory_bandwidth", 1.555e12),
        ("a100-80gb", "bf16", 312e12),
        ("a100-80gb", "fp32", 19.5e12),
        ("l4", "bf16", 121e12),
        ("l40s", "bf16", 362.05e12),
        ("rtx-4090", "bf16", 165.2e12),
        ("rtx-4090", "memory_bandwidth", 1.008e12),
        ("rtx-5090", "memory_bytes", 32e9),
        ("rtx-3090", "bf16", 71e12),
        ("t4", "fp16", 65e12),
        ("t4", "memory_bandwidth", 320e9),
        ("v100", "fp16", 125e12),
        ("mi300x", "bf16", 1307.4e12),
        ("mi300x", "memory_bytes", 192e9),
        ("tpu-v5p", "bf16", 459e12),
        ("tpu-v5p", "memory_bytes", 102e9),
        ("tpu-v5e", "bf16", 197e12),
        ("m1-max", "memory_bandwidth", 400e9),
        ("m2-ultra", "memory_bandwidth", 800e9),
        ("m4-max", "memory_bandwidth", 546e9),
    ],
)
def test_public_figures(name: str, figure: str, value: float) -> None:
    device = DEVICES[name]
    assert (device.peak(figure) if figure in DTYPES else getattr(device, figure)) == value


def test_halved_figures_say_so() -> None:
    halved = {name for name, device in DEVICES.items() if "halved" in device.sources.get("peak_flops.bf16", "")}
    assert halved == {"h100-pcie", "h200", "b200", "l4"}
    assert DEVICES["h100-pcie"].sources["peak_flops.bf16"] == (
        "NVIDIA H100 Tensor Core GPU datasheet, PCIe column; printed with sparsity, halved"
    )


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("h100", "h100-sxm"),
        ("H100-SXM", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("4090", "rtx-4090"),
        ("RTX_4090", "rtx-4090"),
        ("NVIDIA A100 SXM 40 GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("a100", "a100-80gb"),
        ("a100-40", "a100-40gb"),
        ("v5e", "tpu-v5e"),
        ("Apple M4 Max", "m4-max"),
        ("amd instinct mi300x", "mi300x"),
        ("CPU", "cpu"),
    ],
)
def test_names_and_aliases(said: str, meant: str) -> None:
    assert find(said).name == meant


def test_no_name_means_two_devices() -> None:
    names: list[str] = []
    for device in DEVICES.values():
        names += {devices._plain(name) for name in (device.name, device.title, *device.aliases)}
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("said", "near"), [("h10", "h100"), ("rtx-4091", "rtx-4090"), ("b-200", "b200")])
def test_an_unknown_name_meets_the_nearest(said: str, near: str) -> None:
    with pytest.raises(UserError, match=f"device '{said}' is unknown; did you mean {near}"):
        find(said)


def test_unknown_peaks() -> None:
    with pytest.raises(UserError, match=r"NVIDIA T4 in bf16 is unknown \(known: fp32, fp16, int8\); run"):
        find("t4").peak("bf16")
    with pytest.raises(UserError, match=r"Google TPU v5e in fp32 is unknown .*; give it in a file of devices"):
        find("v5e").peak("fp32")
    with pytest.raises(UserError, match="dtype 'bf17' is unknown; did you mean bf16"):
        find("h100").peak("bf17")


@pytest.mark.parametrize(
    ("reported", "memory", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0e9, "h100-sxm"),
        ("NVIDIA H100 PCIe", 85.0e9, "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", 10.5e9, None),  # a slice of one
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10.5e9, None),
        ("NVIDIA A100-SXM4-40GB", 42.3e9, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 85.0e9, None),  # its memory is slower than the SXM one's
        ("NVIDIA GeForce RTX 4090", 25.4e9, "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 17.1e9, None),
        ("Tesla T4", 15.8e9, "t4"),
        ("Tesla V100-SXM2-32GB", 34.1e9, "v100-32gb"),
        ("AMD Instinct MI300X", 206e9, "mi300x"),
        ("Apple M1 Max", None, "m1-max"),
        ("Apple M1", None, None),
    ],
)
def test_what_a_driver_says(reported: str, memory: float | None, name: str | None) -> None:
    found = match(reported, memory)
    assert (found and found.name) == name


OWN = """\
[documents]
sheet = "our own sheet"

[lab-gpu]
title = "the lab's"
kind = "cuda"
aliases = ["lab"]
memory_bytes = [12e9, "sheet: page 2"]
price_per_hour = [0, "it is ours"]
[lab-gpu.peak_flops]
bf16 = [50e12, "sheet"]

[h100-sxm]
title = "NVIDIA H100 SXM, capped at 400 W"
kind = "cuda"
"""


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN, encoding="utf-8")
    mine = find("LAB", path)
    assert (mine.name, mine.memory_bytes, mine.peak("bf16"), mine.price_per_hour) == ("lab-gpu", 12e9, 50e12, 0.0)
    assert mine.sources == {
        "peak_flops.bf16": "our own sheet", "memory_bytes": "our own sheet, page 2", "price_per_hour": "it is ours",
    }  # fmt: skip
    assert find("h100-sxm", path).peak_flops == {}
    assert set(known(path)) == {*DEVICES, "lab-gpu"}
    assert "lab-gpu" not in known()
    assert find("h100-sxm").peak("bf16") == 989.4e12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "not valid TOML"),
        ("documents = 3", "documents is a table of names"),
        ("[documents]\nd = 3", "documents is a table of names"),
        ('x = "y"', "x: a device is a table"),
        ('[x]\ntitle = "x"\nkind = "gpu"', "x: kind = 'gpu' is unknown; did you mean"),
        ('[x]\nkind = "cuda"', "title"),
        ('[x]\ntitle = "x"\nkind = "cuda"\nmemory = 3', "unknown field memory; did you mean memory_bytes"),
        (
            '[x]\ntitle = "x"\nkind = "cuda"\nmemory_bytes = 8e9',
            r'memory_bytes = 8000000000.0: write \[value, "source"\]',
        ),
        ('[x]\ntitle = "x"\nkind = "cuda"\nmemory_bytes = [8e9, " "]', 'write .value, "source"'),
        ('[x]\ntitle = "x"\nkind = "cuda"\nmemory_bytes = [true, "a"]', 'write .value, "source"'),
        ('[x]\ntitle = "x"\nkind = "cuda"\nmemory_bytes = [-8e9, "a"]', "no such figure"),
        ('[x]\ntitle = "x"\nkind = "cuda"\ntdp_watts = [nan, "a"]', "no such figure"),
        ('[x]\ntitle = "x"\nkind = "cuda"\ntdp_watts = [0, "a"]', "no such figure"),
        ('[x]\ntitle = "x"\nkind = "cuda"\npeak_flops = 3', "peak_flops is a table"),
        ('[x]\ntitle = "x"\nkind = "cuda"\n[x.peak_flops]\nbf17 = [1e12, "a"]', "bf17"),
    ],
)
def test_a_bad_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as refused:
        load_devices(path)
    assert str(path) in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the file of devices"):
        load_devices(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid TOML"):
        load_devices(tmp_path / "binary.toml")


@pytest.fixture
def no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_measurement")
def test_this_machine_unmeasured() -> None:
    machine = this_machine(torch.device("cpu"))
    assert (machine.name, machine.kind, machine.peak_flops, machine.measured) == ("cpu", "cpu", {}, None)
    assert machine.cores is not None and machine.cores >= 1
    assert machine.memory_bytes is not None and machine.memory_bytes > 2**28
    assert machine.sources == {"memory_bytes": "reported by the system"}
    with pytest.raises(UserError, match="unknown; run `scratchlm resources measure`"):
        machine.peak("fp32")


@pytest.mark.usefixtures("no_measurement")
@pytest.mark.parametrize(
    ("reported", "memory", "name", "peak"),
    [("NVIDIA H100 80GB HBM3", 85.0e9, "h100-sxm", 989.4e12), ("NVIDIA GeForce GTX 1080", 8.5e9, "gtx-1080", None)],
)
def test_a_gpu_is_asked_its_name(
    monkeypatch: pytest.MonkeyPatch, reported: str, memory: float, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: reported)
    monkeypatch.setattr(devices, "device_memory", lambda device: memory)
    machine = this_machine(torch.device("cuda"))
    assert (machine.name, machine.memory_bytes, machine.peak_flops.get("bf16")) == (name, memory, peak)
    assert machine.kind == "cuda"
    assert machine.sources["memory_bytes"] == "reported by the system"


def test_the_command_lists_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "devices"]) == 0
    rows = {words[0]: words for line in capsys.readouterr().out.splitlines() if len(words := line.split()) > 5}
    assert set(DEVICES) <= set(rows)
    assert rows["h100-sxm"][-6:] == ["989.4", "66.9", "80", "3,350", "3.78", "2026-05"]
    assert rows["t4"][-6:-4] == ["–", "8.1"]


def test_sources_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "devices", "h100-pcie", "--sources"]) == 0
    printed = capsys.readouterr().out
    assert (
        "peak_flops.bf16     7.565e+14  NVIDIA H100 Tensor Core GPU datasheet, PCIe column; printed with sparsity, halved"
        in printed
    )
    assert "a100" not in printed


def test_as_json(capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(OWN, encoding="utf-8")
    assert main(["resources", "devices", "--json", "--file", str(path)]) == 0
    printed = json.loads(capfdbinary.readouterr().out)
    assert printed["a100-40gb"]["memory_bandwidth"] == 1.555e12
    assert {name: Device(**values) for name, values in printed.items()} == known(path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("resources devices h10", "did you mean h100"),
        ("resources devices --file none.toml", "cannot read the file of devices none.toml"),
        ("resources devices --sort name", "unknown option --sort"),
        ("resources measure --device tpu", "tpu"),
        ("resources measure --dtypes fp8", "fp8"),
        (
            "resources measure --device cpu --dtypes tf32 --out never.json",
            "tf32 is a way in which NVIDIA's GPUs multiply",
        ),
        ("resources measure --threads 0", "threads = 0"),
    ],
)
def test_bad_input_is_one_line(command: str, message: str, capsys: pytest.CaptureFixture[str], small: Path) -> None:
    assert main(command.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("scratchlm: error: ") and printed.count("\n") == 1
    assert message in printed
    assert not (small / "never.json").exists()


def test_a_title_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text('[x]\ntitle = "[red]odd[/blue]"\nkind = "cuda"\n')
    assert main(["resources", "devices", "x", "--file", str(tmp_path / "mine.toml")]) == 0
    assert "[red]odd[/blue]" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_told_of_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scratchlm.resources import measure

    monkeypatch.setattr(measure, "measure", lambda *_, **__: pytest.fail("measured for nothing"))
    (tmp_path / "file").write_text("")
    assert main(["resources", "measure", "--quick", "--out", str(tmp_path / "file" / "device.json")]) == 2
    assert "cannot use" in capsys.readouterr().err
