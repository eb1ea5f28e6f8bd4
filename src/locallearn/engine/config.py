"""Every setting of a training run, and the paper's value for each that is not given."""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locallearn.data import AUGMENTATIONS, dataset_spec
from locallearn.data.features import FEATURE_DTYPES
from locallearn.engine.learner import PRECISIONS
from locallearn.engine.optimizers import check_schedule, usual_optimizer
from locallearn.errors import UserError, unknown_name
from locallearn.kernels import choose_backend, missing_for
from locallearn.models import BlockStyle, is_foreign, model_spec
from locallearn.models.sources import absolute_name, model_digest, short_name
from locallearn.rules import Backprop, Requirement, Rule, build_rule, split_rule

DEVICES = ("auto", "cpu", "cuda", "mps")
KEPT = ("last", "best")
_MAX_THREADS = 1024
_NAMED = ("dataset", "model", "rule")
# Of the package's own networks, which alone are built of our blocks.
_OF_OWN_NETWORKS = ("width", "activation", "norm", "dropout")
_OF_THE_HEADS = ("group_blocks", "head_after_pool")

# What `locallearn finetune` has flags for, and what it does without them; None: it depends.
_OF_FINETUNE: dict[str, Any] = {
    "blocks": "auto",
    "dataset": "folder",
    "data_dir": None,
    "image_size": None,
    "augment": None,
    "val_split": 0.2,
    "balance": None,
    "cache": None,
    "limit_train": None,
    "limit_test": None,
    "memory_limit": None,
    "trained_blocks": None,
    "batch_size": None,
    "test_batch_size": None,
    "feature_cache": None,
    "cache_views": 1,
    "cache_dtype": "float32",
    "epochs": None,
    "optimizer": None,
    "lr": None,
    "weight_decay": 0.0,
    "schedule": "none",
    "keep": "last",
    "seed": 0,
    "precision": "fp32",
    "device": None,
    "backend": None,
    "num_threads": None,
}
_FINETUNE_FLAGS = {"cache": "--image-cache", "feature_cache": "--cache"}

# Options of rules that have flags of their own on the command line; others are given with the
# rule's name (`rules.parse_rule`).
_RULE_OPTIONS = (
    "basis",
    "setting",
    "temperature",
    "label_smoothing",
    "num_waves",
    "m_start",
    "similarity",
    "local_loss",
    "update_order",
    "feedback_scale",
    "bp_memory",
)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; None means "the paper's", and :meth:`resolve` fills it in.

    ``data_dir`` and ``cache`` are text, so that the whole is plain JSON. Meanings and units are
    those of the command line's help.

    ``model_digest`` has no flag: it is the sha256 of the Python file that builds the model, where
    one does, and so tells whether that file has changed since.

    The last eight are of `locallearn finetune`: ``start_from`` is its --from, ``start_digest`` the
    sha256 of the weights that were there, ``feature_cache`` its --cache (``cache`` its
    --image-cache).
    """

    dataset: str = "digits"
    data_dir: str | None = None
    cache: str | None = None
    model: str = "smallconv"
    model_digest: str | None = None
    blocks: str = "auto"
    trained_blocks: str = "all"
    rule: str = "lls"
    basis: str | None = None
    setting: str | None = None
    temperature: float | None = None
    label_smoothing: float | None = None
    num_waves: int | None = None
    m_start: str | None = None
    similarity: float | None = None
    local_loss: str | None = None
    update_order: str | None = None
    feedback_scale: float | None = None
    bp_memory: str | None = None
    activation: str | None = None
    norm: str = "batch"
    width: float = 1.0
    group_blocks: int = 1
    head_after_pool: bool = False
    epochs: int | None = None
    batch_size: int = 128
    test_batch_size: int = 128
    lr: float | None = None
    optimizer: str | None = None
    weight_decay: float = 0.0
    schedule: str = "none"
    augment: str | None = None
    image_size: int | None = None
    dropout: float = 0.0
    val_split: float = 0.0
    precision: str = "fp32"
    device: str = "auto"
    channels_last: bool = True
    backend: str = "auto"
    cuda_graph: bool = True
    compile: bool = False
    num_threads: int | None = None
    seed: int = 0
    limit_train: int | None = None
    limit_test: int | None = None
    start_from: str | None = None
    start_digest: str | None = None
    memory_limit: str | None = None
    balance: str = "off"
    keep: str = "last"
    feature_cache: str | None = None
    cache_views: int = 1
    cache_dtype: str = "float32"

    def resolve(self) -> TrainConfig:
        """The same settings checked, with every None that has a default filled in.

        Of a model from elsewhere the form of the name alone is checked, so that a run's record can
        be read where its model is not: see `building.check_model`.

        Raises:
            UserError: the first setting that is wrong.
        """
        rule = self.build_rule()
        if is_foreign(self.model):
            self._check_foreign()
        else:
            model_spec(self.model)
            self.block_style()
        dataset_spec(self.dataset)
        if not self.blocks.strip():
            raise UserError(
                "--blocks is empty; name modules of the model, by commas, or leave it out."
            )
        if not self.trained_blocks.strip():
            raise UserError(
                "--trained-blocks is empty; name blocks of the model, by commas, or give all, or "
                "none to train the output layer alone."
            )
        if self.trained_blocks != "all" and rule.requires is Requirement.TWO_FORWARDS:
            raise UserError(
                f"--rule {rule.name} trains all blocks; leave out --trained-blocks, or use another "
                f"rule."
            )
        if not 0 < self.width < math.inf:
            raise UserError(f"--width must be above 0, got {self.width}.")
        optimizer, lr = usual_optimizer(rule, self.optimizer)
        check_schedule(self.schedule, optimizer)
        if self.augment is not None and self.augment not in AUGMENTATIONS:
            raise unknown_name("augmentation", self.augment, AUGMENTATIONS)
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        counts = ("epochs", "batch_size", "test_batch_size", "group_blocks")
        for name in (*counts, "limit_train", "limit_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{flag(name)} must be at least 1, got {value}.")
        if self.num_threads is not None and not 1 <= self.num_threads <= _MAX_THREADS:
            raise UserError(
                f"--num-threads must be at least 1 and at most {_MAX_THREADS}, "
                f"got {self.num_threads}."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be between 0 and 2**63 - 1, got {self.seed}.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UserError(f"--lr must be above 0, got {self.lr}.")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"--weight-decay must be at least 0, got {self.weight_decay}.")
        num_parts = rule.num_accumulated if isinstance(rule, Backprop) else 1
        smallest = 2 if self.norm == "batch" else 1
        if num_parts * smallest > self.batch_size and num_parts > 1:
            raise UserError(
                f"--bp-memory accumulate:{num_parts} leaves less than {smallest} of "
                f"{self.batch_size} images for each part; give --batch-size at least "
                f"{num_parts * smallest}."
            )
        for name, valid in (
            ("balance", ("on", "off")),
            ("keep", KEPT),
            ("cache_dtype", tuple(FEATURE_DTYPES)),
        ):
            if getattr(self, name) not in valid:
                raise unknown_name(flag(name), str(getattr(self, name)), valid)
        if self.cache_views < 1:
            raise UserError(f"--cache-views must be at least 1, got {self.cache_views}.")
        if self.keep == "best" and not self.val_split:
            raise UserError(
                "--keep best chooses by the validation images, and none are held out. Give "
                "--val-split, or leave --keep out."
            )
        device = choose_device(self.device)
        if self.compile and (missing := missing_for("compiled", device)):
            raise UserError(f"--compile {missing}. Install it, or leave out --compile.")
        choose_backend(self.backend, device)
        options = rule.options()
        filled: dict[str, Any] = {name: options.get(name) for name in _RULE_OPTIONS}
        return dataclasses.replace(
            self,
            **filled,
            model=absolute_name(self.model) if is_foreign(self.model) else self.model,
            model_digest=self.model_digest or model_digest(self.model),
            activation=None if is_foreign(self.model) else self.activation or rule.activation,
            data_dir=self.data_dir and str(Path(self.data_dir).expanduser().absolute()),
            cache=str(Path(self.cache).expanduser().absolute()) if self.cache else None,
            feature_cache=self.feature_cache
            and str(Path(self.feature_cache).expanduser().absolute()),
            epochs=self.epochs or paper_epochs(self.model, self.dataset),
            optimizer=optimizer,
            # Of a model of another make the learner chooses it, by what the model is made of.
            lr=lr if self.lr is None and not is_foreign(self.model) else self.lr,
            augment=self.augment or paper_augmentation(self.model, self.dataset),
            device=device,
            num_threads=self.num_threads or torch.get_num_threads(),
        )

    def _check_foreign(self) -> None:
        """A model from elsewhere has no setting that is built into our own blocks."""
        absolute_name(self.model)
        usual = TrainConfig()
        for name in _OF_OWN_NETWORKS:
            if getattr(self, name) != getattr(usual, name):
                raise UserError(
                    f"{flag(name)} is of the package's own networks, and model {self.model!r} is "
                    f"from elsewhere. Leave it out; what the model's own builder takes is written "
                    f"behind its name: {self.model}:OPTION=VALUE."
                )

    def block_style(self) -> BlockStyle:
        """Of the network's blocks: as given, or as the rule's paper has them."""
        rule = self.build_rule()
        return BlockStyle(self.activation or rule.activation, self.norm)

    def build_rule(self) -> Rule:
        """The rule with those of its options that are given."""
        name, options = split_rule(self.rule)
        for option in _RULE_OPTIONS:
            value = getattr(self, option)
            if value is not None and options.setdefault(option, value) != value:
                raise UserError(
                    f"{flag(option)} is {value}, but --rule {self.rule} says {options[option]}; "
                    f"give it once."
                )
        return build_rule(name, **options)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> TrainConfig:
        """The settings of a run.

        Those that an earlier version did not have take their defaults, which do what it did.

        Raises:
            UserError: settings of a later version of the program, or edited ones.
        """
        defaults = cls().to_json()
        odd = sorted(set(settings) - set(defaults))
        if odd:
            raise UserError(
                f"the run has settings that this version does not know: {', '.join(odd)}. "
                f"Use the version that made it."
            )
        needed = {"dataset", "model", "rule", "seed"}
        if missing := sorted(needed - set(settings)):
            raise UserError(f"settings of the run are missing: {', '.join(missing)}.")
        config = cls(**settings)
        # What depends on the machine is not looked at: weights are read anywhere.
        portable: dict[str, Any] = {
            "device": "cpu",
            "backend": "autograd",
            "compile": False,
            "data_dir": None,
            "cache": None,
            "feature_cache": None,
        }
        own = {name: getattr(config, name) for name in portable}
        try:
            resolved = dataclasses.replace(dataclasses.replace(config, **portable).resolve(), **own)
        except (AttributeError, TypeError) as error:
            raise UserError(f"a setting of the run has the wrong type ({error}).") from error
        read = resolved.to_json()
        changed = [name for name, value in settings.items() if value != read[name]]
        if changed:
            raise UserError(f"settings of the run have no value: {', '.join(changed)}.")
        return resolved


def flag(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def rule_option_names() -> tuple[str, ...]:
    """Names of the settings that are options of some rule."""
    return _RULE_OPTIONS


def setting_name(settings: TrainConfig, name: str) -> str:
    """What a message calls a setting of a run: its flag, if it has one."""
    if name == "model_digest":
        return f"the sha256 of the file of {settings.model}"
    return flag(name)


def data_name(settings: TrainConfig) -> str:
    """The dataset in a word: of `folder` the directory's own name, which alone says what it is."""
    if settings.dataset != "folder" or settings.data_dir is None:
        return settings.dataset
    return Path(settings.data_dir).name or settings.dataset


def model_name(settings: TrainConfig) -> str:
    """The model in a word: of one that a file builds, without the directories."""
    return short_name(settings.model)


def chosen_settings(settings: TrainConfig) -> dict[str, Any]:
    """What is set otherwise than dataset, model and rule alone would have it, by name.

    What a default would take from the machine counts as chosen where it is definite (device,
    backend, threads). The digest of a model's file, or of
    the weights a run started from, never is.

    Arguments:
        settings: resolved or not.
    """
    named = {name: getattr(settings, name) for name in _NAMED}
    plain = TrainConfig(**named)
    usual = plain.resolve().to_json()
    usual |= named
    usual |= {name: getattr(plain, name) for name in ("device", "backend", "num_threads")}
    usual |= {n: getattr(settings, n) for n in ("model_digest", "start_digest")}
    # A learning rate's default is its optimizer's.
    usual["lr"] = usual_optimizer(plain.build_rule(), settings.optimizer)[1]
    given = settings.to_json().items()
    return {name: value for name, value in given if value is not None and value != usual[name]}


def rule_options(settings: TrainConfig) -> dict[str, Any]:
    """Options of the rule, and of what its heads read, that are not the defaults; no basis.

    With `settings.build_rule().name` they say the whole rule.
    """
    rule = settings.build_rule()
    usual = build_rule(rule.name).options() | {"group_blocks": 1, "head_after_pool": False}
    ours = rule.options() | {name: getattr(settings, name) for name in _OF_THE_HEADS}
    return {
        name: value
        for name, value in ours.items()
        if value != usual[name] and name not in ("basis", "setting")
    }


def train_command(settings: TrainConfig) -> str:
    """The shell command that makes such a run: `locallearn train` with dataset, model, rule, and
    whatever else is not the default.

    Device, backend and threads are written out where the settings have them, so that the command
    gives the same run where it is started again. It has no ``--out``. Of a run that started from
    trained weights it is `locallearn finetune`, with what was chosen for it written out.

    Arguments:
        settings: resolved or not.
    """
    if settings.start_from is not None:
        return _finetune_command(settings)
    words = ["locallearn", "train"]
    for name in _NAMED:
        words += [flag(name), getattr(settings, name)]
    for name, value in chosen_settings(settings).items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words += [flag(name), str(value)]
    return shlex.join(words)


def _finetune_command(settings: TrainConfig) -> str:
    assert settings.start_from is not None
    words = ["locallearn", "finetune", "--from", settings.start_from]
    rule = settings.build_rule()
    usual_options = build_rule(rule.name).options()
    options = [f"{n}={v}" for n, v in rule.options().items() if v != usual_options[n]]
    words += ["--rule", ":".join([rule.name, *options])]
    for name, usual in _OF_FINETUNE.items():
        value = getattr(settings, name)
        if value is not None and value != usual:
            words += [_FINETUNE_FLAGS.get(name, flag(name)), str(value)]
    return shlex.join(words)


def paper_epochs(model: str, dataset: str) -> int:
    """How long the paper trains this network; digits, which are not in it, need less.

    A model from elsewhere is trained as long as the paper's smallest.
    """
    if dataset == "digits":
        return 40
    if is_foreign(model):
        return 100
    if model == "mobilenet-v1":
        return 500
    if model.startswith("vgg") and dataset not in ("mnist", "fashion-mnist"):
        return 300
    return 100


def paper_augmentation(model: str, dataset: str) -> str:
    """The recipe that the paper trains this network with; none for digits, which are not in it.

    For a model from elsewhere that of the paper's larger ones.
    """
    if dataset == "digits":
        return "none"
    is_small = model.startswith("smallconv") and not is_foreign(model)
    return "basic" if is_small else "standard"


def choose_device(device: str) -> str:
    """The device that is meant, "auto" made definite. Raises UserError where it is not there."""
    has_mps = torch.backends.mps.is_available()
    if device not in DEVICES:
        raise unknown_name("device", device, DEVICES)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    missing = (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not has_mps
    )
    if missing:
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees no such device on this machine. "
            f"Use --device auto or cpu; `locallearn doctor` tells what is there."
        )
    return device


def differing_settings(saved: TrainConfig, given: dict[str, Any]) -> list[str]:
    """Each given setting that is not the run's own, as "--lr (run: 0.005, given: 0.1)"."""
    ours = saved.to_json()
    differing = []
    for name, value in given.items():
        if name == "device":
            value = choose_device(value)
        if name == "model" and is_foreign(value):
            value = absolute_name(value)
        if name == "backend" and value == "auto":
            continue  # the run's own choice
        if value != ours[name]:
            differing.append(f"{flag(name)} (run: {ours[name]}, given: {value})")
    return differing
