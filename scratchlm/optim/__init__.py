"""Optimizers, learning-rate schedules, gradient clipping, an average of the weights."""

from scratchlm.optim.adafactor import Adafactor
from scratchlm.optim.adam import Adam
from scratchlm.optim.adamw import AdamW
from scratchlm.optim.build import Optimizers, build_optimizers, parameter_roles
from scratchlm.optim.clipping import clip_factor, clip_grad_norm, gradient_norm
from scratchlm.optim.ema import WeightAverage
from scratchlm.optim.lion import Lion
from scratchlm.optim.muon import Muon
from scratchlm.optim.newton_schulz import newton_schulz_reference, orthogonalise
from scratchlm.optim.schedules import lr_multiplier
from scratchlm.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "Lion",
    "Muon",
    "Optimizers",
    "WeightAverage",
    "build_optimizers",
    "clip_factor",
    "clip_grad_norm",
    "gradient_norm",
    "lr_multiplier",
    "newton_schulz_reference",
    "orthogonalise",
    "parameter_roles",
]
