"""Greedy evaluation of a model on a task."""

from ptmoe.evaluate.evaluation import Evaluation, evaluate
from ptmoe.runs.records import Prediction

__all__ = ["Evaluation", "Prediction", "evaluate"]
