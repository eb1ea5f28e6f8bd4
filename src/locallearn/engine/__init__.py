"""From a model and a rule to a trained network: the learner, the training loop, run records."""

from locallearn.engine.learner import LocalLearner, StepResult
from locallearn.engine.optimizers import list_optimizers, list_schedules

__all__ = ["LocalLearner", "StepResult", "list_optimizers", "list_schedules"]
