"""Datasets, the loader that keeps them on the training device, and batch augmentation.

Knows no model and no rule.
"""

from locallearn.data import builtin as _builtin  # noqa: F401 - registers the datasets
from locallearn.data.augment import AUGMENTATIONS, Augmentation
from locallearn.data.dataset import Dataset, DatasetSpec, dataset_spec, list_datasets, load_dataset
from locallearn.data.images import FileImages, ImageSource, InputSpec, MemoryImages
from locallearn.data.loader import ImageLoader, read_for_prediction

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Dataset",
    "DatasetSpec",
    "FileImages",
    "ImageLoader",
    "ImageSource",
    "InputSpec",
    "MemoryImages",
    "dataset_spec",
    "list_datasets",
    "load_dataset",
    "read_for_prediction",
]
