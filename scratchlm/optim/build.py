"""From a model and a configuration to its optimizers: who is updated by what, and a state that can be saved by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scratchlm.config import OptimConfig
from scratchlm.errors import UserError
from scratchlm.optim.adafactor import Adafactor
from scratchlm.optim.adam import Adam
from scratchlm.optim.adamw import AdamW
from scratchlm.optim.ema import WeightAverage
from scratchlm.optim.implementation import GroupedOptimizer, OnePass
from scratchlm.optim.lion import Lion
from scratchlm.optim.muon import Muon
from scratchlm.optim.sgd import SGD


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """What each parameter is: ``embedding``, ``head``, ``norm``, ``bias`` or ``matrix``.

    A model says it itself by an attribute ``role`` of the parameter. Otherwise: weights of an ``nn.Embedding`` and names
    with "embedding" are embeddings; names that start with "head", "lm_head" or "output" are the head; what has fewer than
    two dimensions is a bias or (the rest) a norm; everything else is a matrix. A parameter that appears twice (tied
    embeddings) is listed once, under its first name.

    Args:
        model: any module.

    Returns:
        Name → role, in the model's order; parameters with ``requires_grad=False`` are left out.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    roles = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        declared = getattr(parameter, "role", None)
        if declared is not None:
            role = str(declared)
        elif id(parameter) in embeddings or "embedding" in name.lower():
            role = "embedding"
        elif parameter.ndim < 2:
            role = "bias" if name.rsplit(".", 1)[-1] == "bias" else "norm"
        elif name.startswith(("head", "lm_head", "output")):
            role = "head"
        else:
            role = "matrix"
        roles[name] = role
    return roles


class Optimizers:
    """One or two optimizers that act as one.

    Args:
        optimizers: name → optimizer, e.g. ``{"muon": …, "adamw": …}``.
        names: name → parameter; every parameter of every optimizer has one.
        average: of the parameters, updated after each step; its state is saved with the optimizers'.
    """

    def __init__(
        self,
        optimizers: dict[str, GroupedOptimizer],
        names: dict[str, nn.Parameter],
        average: WeightAverage | None = None,
    ) -> None:
        self.optimizers = optimizers
        self.names = names
        self.average = average
        self._name_of = {id(parameter): name for name, parameter in names.items()}
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, live: each has ``params``, ``lr``, ``initial_lr``, ``weight_decay``, ``name``."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def skips_on_device(self) -> bool:
        """Whether a step can be left out by a number on the device, which nobody has waited for."""
        return all(o.skips_on_device() for o in self.optimizers.values())

    def takes_one_pass(self) -> bool:
        """Whether :meth:`step` can read other gradients, scale them and round into copies, all in one pass over memory."""
        return all(o.takes_one_pass() for o in self.optimizers.values())

    def step(self, skip: Tensor | None = None, one_pass: OnePass | None = None) -> None:
        """One update by every optimizer, and of the average.

        Args:
            skip: 1 to leave everything as it is (a scalar in fp32 on the device); only where :meth:`skips_on_device`.
            one_pass: what is done on the way; only where :meth:`takes_one_pass`.
        """
        for optimizer in self.optimizers.values():
            optimizer.skip, optimizer.one_pass = skip, one_pass or OnePass()
            try:
                optimizer.step()
            finally:  # a step by itself is a plain one
                optimizer.skip, optimizer.one_pass = None, OnePass()
        if self.average is not None:
            self.average.update(skip)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=set_to_none)

    def set_lr(self, multiplier: float) -> None:
        """Set every group's learning rate to `multiplier` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multiplier

    def state_dict(self) -> dict[str, Any]:
        """Name of the optimizer → its torch state dict. The average is in :meth:`named_state` alone."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            UserError: it is of other optimizers.
        """
        if set(state) != set(self.optimizers):
            raise UserError(
                f"the saved optimizer state is of {', '.join(sorted(state))}, not of "
                f"{', '.join(sorted(self.optimizers))}; set optim.optimizer as it was"
            )
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])

    def _states(self) -> Iterator[tuple[str, GroupedOptimizer, nn.Parameter]]:
        for prefix, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield prefix, optimizer, parameter

    def named_state(self) -> dict[str, Tensor]:
        """All state as flat names ``<optimizer>.<key>.<parameter>``, e.g. ``adamw.exp_avg.blocks.0.attention.q.weight``.

        Returns:
            The tensors themselves, not copies; scalars are 0-dim. Empty before the first step. Learning rates are not in
            it: they follow from the step and the configuration.
        """
        named = {}
        for prefix, optimizer, parameter in self._states():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                named[f"{prefix}.{key}.{self._name_of[id(parameter)]}"] = tensor
        return named if self.average is None else {**named, **self.average.named_state()}

    def load_named_state(self, named: dict[str, Tensor]) -> None:
        """Replace all state by (copies of) `named`, as :meth:`named_state` gave it, on each parameter's device.

        The next steps are then bit for bit those of the optimizer that was saved.

        Raises:
            UserError: a name that belongs to no parameter here, a wrong shape, or a parameter with only some of its state.
        """
        averaged: tuple[int, dict[str, Tensor]] = (0, {})
        if self.average is not None:
            own = {name for name in named if name.partition(".")[0] == WeightAverage.PREFIX}
            averaged = self.average.checked({name: named[name] for name in own})
            named = {name: value for name, value in named.items() if name not in own}
        loaded: dict[str, dict[Tensor, dict[str, Tensor]]] = {prefix: {} for prefix in self.optimizers}
        owned = {(prefix, self._name_of[id(p)]): (p, o.state_shapes(p)) for prefix, o, p in self._states()}
        for full, value in named.items():
            prefix, _, rest = full.partition(".")
            key, _, name = rest.partition(".")
            parameter, shapes = owned.get((prefix, name), (None, {}))
            if parameter is None or key not in shapes:
                raise UserError(
                    f"the saved optimizer state has {full}, which this model and optimizer do not have; "
                    "resume with the model and optim settings it was saved with"
                )
            if value.shape != shapes[key]:
                of = "the parameter" if shapes[key] == parameter.shape else "this parameter's"
                raise UserError(
                    f"the saved optimizer state {full} has shape {tuple(value.shape)}, {of} {tuple(shapes[key])}; "
                    "resume with the model it was saved with"
                )
            if value.ndim and value.shape == parameter.shape:  # in the parameter's layout, too
                copy = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:
                copy = value.detach().to(parameter.device, copy=True)
            loaded[prefix].setdefault(parameter, {})[key] = copy
        for prefix, optimizer in self.optimizers.items():
            for owner, state in loaded[prefix].items():
                if missing := set(optimizer.state_shapes(owner)) - set(state):
                    raise UserError(
                        f"the saved optimizer state lacks {prefix}.{min(missing)}.{self._name_of[id(owner)]}; "
                        "the file is incomplete"
                    )
        for prefix, optimizer in self.optimizers.items():
            optimizer.state.clear()
            optimizer.state.update(loaded[prefix])
        if self.average is not None:
            self.average.load(averaged)


def build_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """The optimizers of `config` for the parameters of `model`.

    ``muon`` updates hidden matrices (role ``matrix``) by Muon and all others by AdamW; every other one updates all.
    Norms, biases and embeddings are not decayed unless `decay_embeddings_and_norms` is set. See :func:`parameter_roles`.

    Args:
        model: parameters with ``requires_grad=False`` are left alone; shared ones are updated once.
        config: the recipe's optim section.

    Raises:
        UserError: the model has nothing to train, or an unknown optimizer.
    """
    if config.optimizer not in (known := (*_BUILDERS, "muon")):
        raise UserError(f"optim.optimizer = {config.optimizer!r} is unknown; allowed: {', '.join(known)}")
    roles = parameter_roles(model)
    named = dict(model.named_parameters())
    names = {name: named[name] for name in roles}
    if not names:
        raise UserError("the model has no trainable parameters; there is nothing to optimize")

    def groups(decay: float, chosen: list[str]) -> list[dict[str, Any]]:
        spared: tuple[str, ...] = () if config.decay_embeddings_and_norms else ("embedding", "norm", "bias")
        own_rate = ("embedding",) if config.embedding_lr is not None else ()
        decayed = [names[name] for name in chosen if roles[name] not in spared + own_rate]
        others = [names[name] for name in chosen if roles[name] in spared and roles[name] not in own_rate]
        embeddings = [names[name] for name in chosen if roles[name] in own_rate]
        found: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": decay, "name": "decay"},
            {"params": others, "weight_decay": 0.0, "name": "no_decay"},
        ]
        if embeddings:
            embedding_decay = 0.0 if "embedding" in spared else decay
            found.append(
                {
                    "params": embeddings,
                    "weight_decay": embedding_decay,
                    "lr": config.embedding_lr,
                    "name": "embedding",
                }
            )
        return [group for group in found if group["params"]]

    matrices = [name for name, role in roles.items() if role == "matrix" and names[name].ndim >= 2]
    optimizers: dict[str, GroupedOptimizer] = {}
    rest = list(names)
    if config.optimizer == "muon":
        if matrices:
            optimizers["muon"] = Muon(
                groups(config.muon_weight_decay, matrices),
                lr=config.muon_lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                implementation=config.implementation,
            )
        rest = [name for name in names if name not in set(matrices)]
    if rest:
        kind = "adamw" if config.optimizer == "muon" else config.optimizer
        decay = config.adam_weight_decay if kind == "adam" else config.weight_decay
        options = {"lr": config.lr, "implementation": config.implementation}
        optimizers[kind] = _BUILDERS[kind](config, groups(decay, rest), options)
    return Optimizers(optimizers, names, WeightAverage(names, config.ema) if config.ema else None)


_BUILDERS: dict[str, Callable[[OptimConfig, list[dict[str, Any]], dict[str, Any]], GroupedOptimizer]] = {
    "adamw": lambda config, groups, options: AdamW(groups, betas=config.betas, eps=config.eps, **options),
    "adam": lambda config, groups, options: Adam(groups, betas=config.betas, eps=config.eps, **options),
    "lion": lambda config, groups, options: Lion(groups, betas=config.lion_betas, **options),
    "adafactor": lambda config, groups, options: Adafactor(
        groups,
        decay=config.adafactor_decay,
        clip=config.adafactor_clip,
        relative_step=config.adafactor_relative_step,
        scale_parameter=config.adafactor_scale_parameter,
        **options,
    ),
    "sgd": lambda config, groups, options: SGD(
        groups, momentum=config.momentum, nesterov=config.nesterov, **options
    ),
}
"""Those that update every kind of parameter, by name: (config, groups, lr and implementation) → the optimizer."""
