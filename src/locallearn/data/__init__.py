"""Datasets, the loader that keeps them on the training device, and batch augmentation.

Knows no model and no rule.
"""

from locallearn.data import builtin as _builtin  # noqa: F401 - registers the datasets
from locallearn.data import tiny_imagenet as _tiny_imagenet  # noqa: F401
from locallearn.data import vww as _vww  # noqa: F401
from locallearn.data.augment import AUGMENTATIONS, Augmentation
from locallearn.data.dataset import Dataset, DatasetSpec, dataset_spec, list_datasets, load_dataset
from locallearn.data.images import (
    FileImages,
    ImageSource,
    InputSpec,
    MappedImages,
    MemoryImages,
)
from locallearn.data.listening import SILENT, DataListener, SilentListener, Work
from locallearn.data.loader import ImageLoader, read_for_prediction

__all__ = [
    "AUGMENTATIONS",
    "SILENT",
    "Augmentation",
    "DataListener",
    "Dataset",
    "DatasetSpec",
    "FileImages",
    "ImageLoader",
    "ImageSource",
    "InputSpec",
    "MappedImages",
    "MemoryImages",
    "SilentListener",
    "Work",
    "dataset_spec",
    "list_datasets",
    "load_dataset",
    "read_for_prediction",
]
