"""From a model and a rule to a trained network: the learner, the training loop, run records."""

from locallearn.engine.audit import audit_locality
from locallearn.engine.config import DEVICES, TrainConfig, choose_device
from locallearn.engine.evaluation import Evaluation, evaluate
from locallearn.engine.exits import Calibration, Prediction
from locallearn.engine.learner import PRECISIONS, LocalLearner
from locallearn.engine.optimizers import list_optimizers, list_schedules
from locallearn.engine.results import StepResult
from locallearn.engine.run import Metrics, Row, RunConfig, RunDirectory
from locallearn.engine.trainer import Interrupted, Observer, Snapshot, Trainer
from locallearn.engine.weights import Trained, load_exits, load_trained

__all__ = [
    "DEVICES",
    "PRECISIONS",
    "Calibration",
    "Evaluation",
    "Interrupted",
    "LocalLearner",
    "Metrics",
    "Observer",
    "Prediction",
    "Row",
    "RunConfig",
    "RunDirectory",
    "Snapshot",
    "StepResult",
    "TrainConfig",
    "Trained",
    "Trainer",
    "audit_locality",
    "choose_device",
    "evaluate",
    "list_optimizers",
    "list_schedules",
    "load_exits",
    "load_trained",
]
