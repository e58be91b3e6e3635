"""An estimate as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scratchlm.resources.answer import Estimate, OperationGroup
    from scratchlm.resources.tables import Target


def as_json(estimate: Estimate, target: Target | None = None) -> dict[str, Any]:
    """Dicts, lists, strings, numbers and None; bytes and FLOPs as they are, without prefixes.

    ::

        name, precision, compiled, micro_batch, accumulation, length, steps, tokens      what is trained
        params, active_params, embedding_params                              numbers
        flops_per_token      forward, backward (traced), model (the formula: 3 × the products of a forward pass), six_n
        components           [path, copies, params, active, weights, gradients, state, forward, backward, kept]: numbers, bytes
                             of them, FLOPs per token, bytes kept for the backward pass
        operations           [phase, component, name, calls, flops, flops_per_token, moved, intensity, seconds, flops_per_second,
                             bound] of one micro-batch, costliest first; seconds and what follows are None without a machine
        memory               peak, moment, at_peak (kind → bytes), by_component (activations and temporaries at the peak),
                             timeline: phases (the phase of every operation), live (bytes at it) and by_kind (kind → bytes)
        micro_batches        fixed_bytes + bytes_per_sequence · sequences; largest: None without a device's memory
        cache                bytes_per_token, bytes_bounded (per sequence, of windows and states)
        savings              change → peak bytes with it
        time                 machine, assumptions, compiled, by_phase, step, tokens_per_second, model_flops_per_second, total
                             (seconds), price (USD, or None); None without a machine
        target               device (its name, or None), memory_bytes, price_per_hour, notes; None: not given

    Args:
        estimate: from :func:`scratchlm.resources.estimate.estimate`.
        target: what it was made for.
    """
    e = estimate
    return {
        "name": e.name,
        "precision": e.precision,
        "compiled": e.compiled,
        "micro_batch": e.micro_batch,
        "accumulation": e.accumulation,
        "length": e.length,
        "steps": e.steps,
        "tokens": e.tokens,
        "params": e.params,
        "active_params": e.active_params,
        "embedding_params": e.embedding_params,
        "flops_per_token": {
            "forward": e.forward_flops,
            "backward": e.backward_flops,
            "model": e.model_flops,
            "six_n": e.six_n,
        },
        "components": [asdict(component) for component in e.components],
        "operations": [_operation(group, e) for group in e.operations],
        "memory": {
            "peak": e.memory.peak,
            "moment": e.memory.moment,
            "at_peak": dict(e.memory.at_peak),
            "by_component": dict(e.memory.by_component),
            "timeline": {
                "phases": [phase for phase, _ in e.memory.timeline],
                "live": [live for _, live in e.memory.timeline],
                "by_kind": dict(e.memory.by_kind),
            },
        },
        "micro_batches": {
            "fixed_bytes": e.fixed_bytes,
            "bytes_per_sequence": e.bytes_per_sequence,
            "largest": e.largest_micro_batch,
        },
        "cache": {"bytes_per_token": e.cache_bytes_per_token, "bytes_bounded": e.cache_bytes_bounded},
        "savings": dict(e.savings),
        "time": None if e.time is None else asdict(e.time) | {"assumptions": list(e.time.assumptions)},
        "target": None if target is None else _target(target),
    }


def _operation(group: OperationGroup, estimate: Estimate) -> dict[str, Any]:
    rate = group.flops / group.seconds if group.seconds else None
    return asdict(group) | {
        "flops_per_token": estimate.flops_per_token(group),
        "intensity": group.intensity,
        "flops_per_second": rate,
    }


def _target(target: Target) -> dict[str, Any]:
    return {
        "device": None if target.device is None else target.device.name,
        "memory_bytes": target.memory_bytes,
        "price_per_hour": target.price_per_hour,
        "notes": list(target.notes),
    }
