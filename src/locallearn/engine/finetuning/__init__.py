"""Fine-tuning: from where weights come, what they are put into, and what a frozen front saves.

`source` reads --from; `loading` puts the weights into a learner; `front` finds what runs before the
first block that learns and has a model go on from there, `front_cache` keeps on disk what it makes
of the images; `choosing` fills in what few images need, and what fits a memory limit.
"""

from locallearn.engine.finetuning.choosing import FineTuning, class_counts, plan_finetuning
from locallearn.engine.finetuning.front import FrozenFront, find_front
from locallearn.engine.finetuning.front_cache import cached_features
from locallearn.engine.finetuning.loading import Loaded, load_start
from locallearn.engine.finetuning.peak import PeakWatch
from locallearn.engine.finetuning.source import Start, read_source
from locallearn.engine.finetuning.training_front import TrainingFront

__all__ = [
    "FineTuning",
    "FrozenFront",
    "Loaded",
    "PeakWatch",
    "Start",
    "TrainingFront",
    "cached_features",
    "class_counts",
    "find_front",
    "load_start",
    "plan_finetuning",
    "read_source",
]
