"""Kernels: one file per kernel, the lecture's formula beside its fast twin, held equal by tests."""
