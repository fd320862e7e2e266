"""Greedy evaluation of a model on a task."""

from ptmoe.evaluate.generation import Evaluation, Prediction, evaluate

__all__ = ["Evaluation", "Prediction", "evaluate"]
