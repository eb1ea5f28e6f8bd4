"""Models from elsewhere: their names, what is built of them, and what is said against them."""

from __future__ import annotations

import hashlib
import re
import socket
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from locallearn import UserError, build_model, list_models
from locallearn.models import BlockStyle
from locallearn.models.sources import absolute_name, check_logits, model_digest, short_name
from locallearn.models.sources.names import parse_name

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _without_a_network(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a model's builder asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a Python file, by default net.py; returns its path."""

    def put(text: str, name: str = "net.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return put


NET = """
    from torch import nn

    def build(num_classes, in_channels, *, depth=1):
        layers = [nn.Conv2d(in_channels, 4, 3, padding=1)]
        layers += [nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth - 1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(4, num_classes))
"""


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source", "name", "options"),
    [
        ("torchvision:resnet18", "torchvision", "resnet18", {}),
        ("torchvision:resnet18:stem=cifar", "torchvision", "resnet18", {"stem": "cifar"}),
        ("timm:vit:img_size=32:drop-rate=0.1", "timm", "vit", {"img_size": 32, "drop_rate": 0.1}),
        ("net.py:build", "net.py", "build", {}),
        ("a dir/b.py/net.py:f:x=[1,2]", "a dir/b.py/net.py", "f", {"x": [1, 2]}),
        ("net.py:f:a=True:b='1':c=x:y", "net.py", "f", {"a": True, "b": "1", "c": "x:y"}),
    ],
)
def test_a_name_is_taken_apart(text: str, source: str, name: str, options: dict) -> None:
    parsed = parse_name(text)
    assert (parsed.source, parsed.name, parsed.options) == (source, name, options)


def test_only_a_files_path_is_made_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute_name("timm:vit:img_size=32") == "timm:vit:img_size=32"
    assert absolute_name("nets/net.py:build:a=1") == f"{tmp_path}/nets/net.py:build:a=1"
    assert absolute_name("~/net.py:build") == "/home/me/net.py:build"
    assert absolute_name("/x/net.py:build") == "/x/net.py:build"
    assert short_name("/x/net.py:build:a=1") == "net.py:build:a=1"
    assert short_name("timm:vit:img_size=32") == "timm:vit:img_size=32"
    assert short_name("smallconv") == "smallconv"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", r"unknown model 'resnet18'.* From elsewhere: torchvision:NAME, timm:NAME or"),
        ("torchvison:resnet18", r"unknown source .* 'torchvison'. Did you mean 'torchvision'\?"),
        ("smallconv:width=2", r"model 'smallconv' takes no options behind its name"),
        ("torchvision:", r"names no model of torchvision"),
        ("net.py", r"names no function of net.py. Write FILE.py:FUNCTION"),
        ("net.py:2", r"names no function of net.py"),
        ("nowhere/net.py:build", r"there is no file \S*/nowhere/net.py, which builds"),
        ("timm:vit:a=1:a=2", r"gives the option 'a' twice"),
        ("timm:vit:a=false", r"written as in Python: a=False"),
        ("torchvision:resnt18", r"unknown torchvision model 'resnt18'. Did you mean 'resnet18' or"),
        ("torchvision:raft_large", r"torchvision:raft_large does not classify images"),
        ("torchvision:resnet18:weights=DEFAULT", r"'weights' can't be given: nothing is downl"),
        ("torchvision:resnet18:stem=small", r"unknown stem 'small'. Valid: cifar"),
        (
            "torchvision:alexnet:stem=cifar",
            r"stem=cifar is for torchvision's ResNet family; ",
        ),
        ("torchvision:resnet18:depth=3", r"can't be built: TypeError: .*argument 'depth'\.$"),
    ],
)
def test_errors_of_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_model(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"dropout": 0.1},
            "dropout is of the package's own networks; model 'torchvision:res",
        ),
        ({"width": 2.0}, "width is of the package's own networks"),
        ({"style": BlockStyle("relu")}, "style is of the package's own networks"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ],
)
def test_settings_of_our_own_networks_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model("torchvision:resnet18", **setting)


def test_models_are_listed_by_a_glob() -> None:
    assert list_models("torchvision:resnet?01") == ["torchvision:resnet101"]
    assert "torchvision:fasterrcnn_resnet50_fpn" not in list_models("torchvision:*")
    assert list_models("torchvision:none*") == []
    with pytest.raises(UserError, match=r"models of 'net.py' can't be listed"):
        list_models("net.py:*")


# -- torchvision --------------------------------------------------------------------------------


def test_torchvision_for_small_images() -> None:
    model = build_model("torchvision:resnet18:stem=cifar", num_classes=7, in_channels=1)
    conv = model.conv1
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (1, 64, (3, 3))
    assert (conv.stride, conv.padding, conv.bias) == ((1, 1), (1, 1), None)
    assert isinstance(model.maxpool, nn.Identity)
    assert model.layer1(model.conv1(torch.zeros(1, 1, 8, 8))).shape == (1, 64, 8, 8)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)


def test_the_first_convolution_takes_the_channels() -> None:
    model = build_model("torchvision:mobilenet_v3_small", num_classes=3, in_channels=5)
    usual = build_model("torchvision:mobilenet_v3_small")
    ours, theirs = model.features[0][0], usual.features[0][0]
    assert ours.in_channels == 5
    for fact in ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(ours, fact) == getattr(theirs, fact), fact
    assert (ours.bias is None) == (theirs.bias is None)
    assert model(torch.randn(2, 5, 32, 32)).shape == (2, 3)


def test_auxiliary_classifiers_are_off() -> None:
    """And nothing warns: in the tests a warning is an error."""
    model = build_model("torchvision:googlenet", num_classes=4).train()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_a_vision_transformer_is_built_for_the_images() -> None:
    with torch.device("meta"):
        model = build_model("torchvision:vit_b_32", num_classes=4, image_size=64)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
        own = build_model("torchvision:vit_b_32:image_size=96", image_size=64)
        assert own(torch.randn(1, 3, 96, 96)).shape == (1, 10)


# -- timm ---------------------------------------------------------------------------------------


def test_timm_for_other_images_and_classes() -> None:
    pytest.importorskip("timm")
    model = build_model("timm:resnet10t", num_classes=4, in_channels=1, image_size=32)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    vit = "timm:vit_tiny_patch16_224:depth=1:patch_size=8"
    model = build_model(vit, num_classes=3, image_size=(16, 24))
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 3)
    assert len(model.blocks) == 1
    with pytest.raises(AssertionError):
        model(torch.randn(2, 3, 24, 24))
    own = build_model(f"{vit}:img_size=40", image_size=16)
    assert own(torch.randn(1, 3, 40, 40)).shape == (1, 10)
    assert build_model("timm:vit_tiny_patch16_224:depth=1").patch_embed.img_size == (224, 224)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tinny_patch16_224", r"unknown timm model .* Did you mean 'vit_tiny_patch16_"),
        ("timm:hf_hub:timm/resnet18.a1_in1k", r"unknown timm model 'hf_hub:timm/resnet18.a1_in1k'"),
        ("timm:resnet18:pretrained=True", r"'pretrained' can't be given: nothing is downloaded"),
        ("timm:resnet10t:speed=3", r"can't be built: TypeError: .*'speed'"),
    ],
)
def test_errors_of_timm(name: str, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=message):
        build_model(name)


def test_timm_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for ask in (lambda: build_model("timm:resnet18"), lambda: list_models("timm:*")):
        with pytest.raises(UserError, match=r"need it: pip install 'locallearn\[timm\]'"):
            ask()


# -- files --------------------------------------------------------------------------------------


def test_a_file_builds_a_model(write: Write) -> None:
    path = write(NET)
    model = build_model(f"{path}:build:depth=3", num_classes=5, in_channels=2, image_size=8)
    assert model(torch.randn(2, 2, 8, 8)).shape == (2, 5)
    assert sum(isinstance(module, nn.Conv2d) for module in model) == 3
    assert str(path.parent) not in sys.path
    assert not (path.parent / "__pycache__").exists()


def test_a_function_is_given_the_facts_that_it_takes(write: Write) -> None:
    path = write("""
        from torch import nn
        seen = {}

        def remembering(facts):
            module = nn.Identity()
            module.facts = facts
            return module

        def none():
            return remembering({})

        def two(image_size, in_channels=9, depth=1):
            return remembering({"image_size": image_size, "in_channels": in_channels})

        def all(**facts):
            return remembering(facts)
    """)
    facts = {"num_classes": 5, "in_channels": 2, "image_size": 8}
    assert build_model(f"{path}:none", **facts).facts == {}
    assert build_model(f"{path}:two", **facts).facts == {"image_size": (8, 8), "in_channels": 2}
    facts["image_size"] = (8, 12)
    assert build_model(f"{path}:all:depth=2", **facts).facts == {**facts, "depth": 2}
    del facts["image_size"]
    assert build_model(f"{path}:all", **facts).facts == facts


def test_a_class_is_a_function_that_builds(write: Write) -> None:
    path = write("""
        import dataclasses
        from torch import nn

        @dataclasses.dataclass
        class Plan:
            width: int = 3

        class Net(nn.Linear):
            def __init__(self, num_classes):
                super().__init__(Plan().width, num_classes)
    """)
    assert build_model(f"{path}:Net", num_classes=4).out_features == 4


def test_modules_beside_the_file_are_its_own(write: Write) -> None:
    """Of the same name in two directories, and after an edit; also imported while building."""
    text = """
        from torch import nn

        def build():
            import helper
            return nn.Linear(1, helper.WIDTH)
    """
    first, second = write(text, "one/net.py"), write(text, "two/net.py")
    write("WIDTH = 1", "one/helper.py")
    write("WIDTH = 22", "two/helper.py")
    assert build_model(f"{first}:build").out_features == 1
    assert build_model(f"{second}:build").out_features == 22
    assert build_model(f"{first}:build").out_features == 1
    write("WIDTH = 333", "one/helper.py")
    assert build_model(f"{first}:build").out_features == 333


def test_an_edit_of_the_same_length_and_second_counts(write: Write) -> None:
    for width in (1, 2):
        path = write(f"from torch import nn\ndef build(): return nn.Linear(1, {width})")
        assert build_model(f"{path}:build").out_features == width
        assert model_digest(f"{path}:build") == hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    assert model_digest(f"{path}:build") is None
    assert model_digest("torchvision:resnet18") is model_digest("smallconv") is None


@pytest.mark.parametrize(
    ("text", "option", "message"),
    [
        (
            NET,
            "bild",
            r"unknown function of \S*net.py: 'bild'. Did you mean 'build'\? Valid: b",
        ),
        ("x = 1", "build", r"net.py has no function 'build', and no other either"),
        (NET, "build:dept=3", r"build of \S*net.py has no option 'dept'; it has: depth"),
        (NET, "build:in_channels=3", r"option 'in_channels' can't be given: it is the number of"),
        ("def build(): return 3", "build", r"build of \S*net.py returns int; it must return the"),
        ("from torch import nn\nbuild = nn.ReLU()", "build", r"is a ReLU that is built already"),
        ("def build(:", "build", r"net.py can't be run: \S*net.py, line 1: SyntaxError: invalid"),
        ("import torch\n1 / 0", "build", r"net.py, line 2: ZeroDivisionError: division by zero\.$"),
        ("import sys\nsys.exit(3)", "build", r"net.py, line 2: SystemExit: 3\.$"),
        ("import nothing_such", "build", r"net.py, line 1: ModuleNotFoundError: .*nothing_such"),
        ("def build(depth): pass", "build", r"can't be built: TypeError: .*argument: 'depth'\.$"),
        (
            "def build():\n    import torch\n    raise torch.OutOfMemoryError('a\\nb')",
            "build",
            r"can't be built: \S*net.py, line 3: OutOfMemoryError: a b\.$",
        ),
    ],
)
def test_errors_of_files_are_a_line(write: Write, text: str, option: str, message: str) -> None:
    path = write(text)
    before = list(sys.path)
    with pytest.raises(UserError, match=message) as caught:
        build_model(f"{path}:{option}")
    assert "\n" not in str(caught.value)
    assert sys.path == before


def test_an_error_beside_the_file_is_found_there(write: Write) -> None:
    write("def broken():\n    raise KeyError('x')", "helper.py")
    path = write("import helper\ndef build():\n    helper.broken()")
    with pytest.raises(UserError, match=r"helper.py, line 2: KeyError: 'x'\.$") as caught:
        build_model(f"{path}:build")
    assert isinstance(caught.value.__cause__, KeyError)


# -- what a model makes of images -----------------------------------------------------------------


def test_logits_are_checked(write: Write) -> None:
    path = write("""
        import torch

        class Net(torch.nn.Module):
            def __init__(self, num_classes, what="logits"):
                super().__init__()
                self.linear, self.what = torch.nn.Linear(16, num_classes), what

            def forward(self, x):
                logits = self.linear(x.flatten(1))
                return {"logits": logits, "tuple": (logits,)}[self.what]
    """)
    images = torch.zeros(2, 1, 4, 4)
    model = build_model(f"{path}:Net", num_classes=3).train()
    check_logits(f"{path}:Net", model, images, 3)
    assert model.training
    with pytest.raises(UserError, match=r"makes a tensor of shape \(2, 3\) of 2 .*\(2, 4\)"):
        check_logits(f"{path}:Net", model, images, 4)
    wide = torch.zeros(2, 1, 4, 5)
    with pytest.raises(
        UserError, match=r"Net' does not take images of 1x4x5: \S*net.py, line 10: RuntimeError: "
    ):
        check_logits(f"{path}:Net", model, wide, 3)
    model = build_model(f"{path}:Net:what=tuple", num_classes=3)
    with pytest.raises(UserError, match=re.escape("makes tuple of 2 images")):
        check_logits(f"{path}:Net:what=tuple", model, images, 3)
