"""A run behind a frozen front: what the front makes of each part of the data, as loaders."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from locallearn.data import DataListener, Dataset, ImageLoader
from locallearn.data.features import FeatureLoader
from locallearn.engine.building import evaluation_loader
from locallearn.engine.config import TrainConfig
from locallearn.engine.finetuning.front import FrozenFront, find_front
from locallearn.engine.finetuning.front_cache import Part, cached_features
from locallearn.engine.learner import LocalLearner

_NUM_CHECKED = 4  # images that the front is found and checked on


@dataclass(frozen=True)
class TrainingFront:
    """What a training loop needs to train behind a frozen front.

    Arguments:
        front: of its learner.
        train_loader, test_loader, val_loader: of what the front makes of the images.
    """

    front: FrozenFront
    train_loader: FeatureLoader
    test_loader: FeatureLoader
    val_loader: FeatureLoader | None

    def skipped(self) -> contextlib.AbstractContextManager[None]:
        """Within: the learner takes what the loaders yield."""
        return self.front.skipped()

    @classmethod
    def of(
        cls,
        learner: LocalLearner,
        settings: TrainConfig,
        dataset: Dataset,
        device: torch.device,
        listener: DataListener,
    ) -> TrainingFront:
        """Find the front, and what it makes of the data, or make it.

        Arguments:
            learner: with its weights, in the mode it trains in.
            settings: of the run, resolved, with a ``feature_cache``.
            dataset: of the run.
            device: of the learner.
            listener: is told of what takes long.

        Raises:
            UserError: nothing frozen in front, or what can't be passed over; too little room.
        """
        assert settings.feature_cache is not None
        size = settings.test_batch_size
        plain = evaluation_loader(dataset.train, dataset, size, device)
        front = find_front(learner, _first_images(plain))
        views = plain
        if settings.cache_views > 1:
            views = ImageLoader(
                dataset.train,
                dataset.inputs,
                batch_size=size,
                device=device,
                augmentation=dataset.augmentation,
                seed=settings.seed,
                backend=settings.backend,
            )
        words, num_views = dataset.augmentation.describe(), settings.cache_views
        parts = [Part("train", views, num_views, words, dataset.train.fingerprint())]
        for name, source in (("test", dataset.test), ("val", dataset.val)):
            if source is not None:
                loader = evaluation_loader(source, dataset, size, device)
                parts.append(Part(name, loader, 1, "none", source.fingerprint()))
        directory = Path(settings.feature_cache)
        features = cached_features(front, parts, directory, settings, dataset.inputs, listener)

        def loader_of(name: str, labels: Tensor, *, trains: bool = False) -> FeatureLoader:
            return FeatureLoader(
                features[name],
                labels,
                kept_as=settings.cache_dtype,
                dtype=front.feature_dtype,
                batch_size=settings.batch_size if trains else size,
                device=device,
                shuffle=trains,
                seed=settings.seed,
                balance=trains and settings.balance == "on",
            )

        val = None if dataset.val is None else loader_of("val", dataset.val.labels)
        return cls(
            front,
            loader_of("train", dataset.train.labels, trains=True),
            loader_of("test", dataset.test.labels),
            val,
        )


def _first_images(loader: ImageLoader) -> Tensor:
    """A few images of a part; over again where it has fewer."""
    found: list[Tensor] = []
    for images, _ in loader.epoch():
        found.append(images)
        if sum(map(len, found)) >= _NUM_CHECKED:
            break
    images = torch.cat(found)
    return images[torch.arange(_NUM_CHECKED, device=images.device) % len(images)]
