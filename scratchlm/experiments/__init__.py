"""Choices compared under an equal budget, with seeds: which is better, and is it noise?

from scratchlm.experiments import Ablation, load_experiment
experiment = load_experiment("recipes/experiments/norm-placement.toml")
comparison = Ablation(experiment, Path("recipes/experiments/norm-placement.toml"), Path("runs/norms")).run()
"""

from scratchlm.experiments.ablate import Ablation
from scratchlm.experiments.comparison import Comparison, Row
from scratchlm.experiments.spec import Experiment, load_experiment
from scratchlm.experiments.statistics import Difference, paired_difference

__all__ = ["Ablation", "Comparison", "Difference", "Experiment", "Row", "load_experiment", "paired_difference"]
