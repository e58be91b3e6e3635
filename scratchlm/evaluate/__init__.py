"""Evaluation: loss, perplexity and bits per byte on held-out text, compressors beside them, curves and a report."""

from scratchlm.evaluate.compressors import COMPRESSORS, CompressorResult, compressed_sizes
from scratchlm.evaluate.environment import describe_environment
from scratchlm.evaluate.metrics import Evaluation, LossSum, bits_per_byte, evaluate_loss, perplexity
from scratchlm.evaluate.plots import plot_loss
from scratchlm.evaluate.report import write_report
from scratchlm.evaluate.samples import Sample, read_samples, write_samples

__all__ = [
    "COMPRESSORS",
    "CompressorResult",
    "Evaluation",
    "LossSum",
    "Sample",
    "bits_per_byte",
    "compressed_sizes",
    "describe_environment",
    "evaluate_loss",
    "perplexity",
    "plot_loss",
    "read_samples",
    "write_report",
    "write_samples",
]
