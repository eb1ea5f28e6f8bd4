"""Which classes belong together: the groups of CIFAR-10 and CIFAR-100, or those of a file.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009), for the 20
superclasses of CIFAR-100; CIFAR-10's two are the paper's animals and vehicles.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from locallearn.errors import UserError

Groups = Mapping[str, Sequence[str]]

CIFAR10: Groups = {
    "animals": ("bird", "cat", "deer", "dog", "frog", "horse"),
    "vehicles": ("airplane", "automobile", "ship", "truck"),
}
CIFAR100: Groups = {
    "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}


def groups_of(class_names: Sequence[str], file: Path | None) -> list[str]:
    """The group of each class, in label order.

    Arguments:
        class_names: K names.
        file: {group: [class, ...]} as .json, or rows of group,class as .csv; None where the names
            are to tell whether the classes are CIFAR-10's or CIFAR-100's.

    Raises:
        UserError: classes that have no known groups, a file that can't be read, or one that does
            not put every class into one group.
    """
    if file is not None:
        return _assigned(class_names, _read(file), str(file))
    for groups in (CIFAR10, CIFAR100):
        if sorted(class_names) == sorted(name for names in groups.values() for name in names):
            return _assigned(class_names, groups, "")
    raise UserError(
        "which classes belong together is known of CIFAR-10 and CIFAR-100 alone; give --groups, a "
        "file of {group: [class, ...]} as .json or of rows group,class as .csv."
    )


def _read(file: Path) -> Groups:
    if not file.is_file():
        raise UserError(f"--groups {file} does not exist.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--groups {file} is no text in UTF-8.") from error
    if file.suffix.lower() == ".csv":
        table: dict[str, list[str]] = {}
        for number, row in enumerate(csv.reader(text.splitlines()), start=1):
            cells = [cell.strip() for cell in row]
            if not any(cells) or (number == 1 and cells == ["group", "class"]):
                continue
            if len(cells) != 2 or not all(cells):
                raise UserError(f"--groups {file}, line {number}: expected group,class.")
            table.setdefault(cells[0], []).append(cells[1])
        return table
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"--groups {file} is no valid JSON ({error}).") from error
    if not isinstance(value, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in value.values()
    ):
        raise UserError(f"--groups {file} must be {{group: [class, ...]}}.")
    return value


def _assigned(class_names: Sequence[str], groups: Groups, origin: str) -> list[str]:
    table: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            if name not in class_names:
                raise UserError(
                    f"--groups {origin}: {name!r} is no class of the run. Its classes: "
                    f"{', '.join(class_names)}."
                )
            if table.setdefault(name, group) != group:
                raise UserError(f"--groups {origin}: {name!r} is in two groups.")
    if missing := [name for name in class_names if name not in table]:
        raise UserError(f"--groups {origin} has no group for: {', '.join(missing)}.")
    sizes = [len(set(names)) for names in groups.values() if names]
    if len(sizes) < 2 or max(sizes) < 2:
        raise UserError(
            f"--groups {origin}: two groups are needed, one of them of two classes or more."
        )
    return [table[name] for name in class_names]
