"""What each block of a model reads: other blocks, and parameters that lie in none.

The model runs with its blocks cut off from each other, each handing on leaves of its own, so that
the graphs in between show by which way every tensor came.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from locallearn.engine.blocks.chain import forwards_through
from locallearn.engine.blocks.layout import (
    PLAIN,
    Layout,
    fitting_layout,
    possible_layouts,
    read_output,
)
from locallearn.engine.blocks.recognition import cut_at_head
from locallearn.engine.blocks.standing_in import standing_in
from locallearn.engine.blocks.trace import (
    Inputs,
    call_model,
    evaluating,
    foreseeing_failure,
    num_inputs,
    rolled,
    tensors_of,
)
from locallearn.errors import UserError
from locallearn.models import Block


@dataclass
class Read:
    """What a tensor, or several, was made of since the last block: names; of the modules those
    that are watched."""

    parameters: set[str] = field(default_factory=set)
    blocks: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)

    def add(self, other: Read) -> None:
        self.parameters |= other.parameters
        self.blocks |= other.blocks
        self.modules |= other.modules


@dataclass
class Lying:
    """How a block's output lies, and the shape of its view, (N, C, H, W) or (N, F)."""

    layout: Layout
    view_shape: torch.Size


@dataclass
class Wiring:
    """What each block and the logits read, and how the blocks' outputs lie.

    Attributes:
        of_block: name -> what its inputs are made of; of a block that does not run, nothing.
        of_logits: what the model's output is made of.
        lying: name -> how its output lies.
        unfit: name -> why nothing can be learned from its output.
        outputs: the tensors of the model's output.
        parameter_names: id of a parameter -> its name in the model.
    """

    of_block: dict[str, Read]
    of_logits: Read
    parameter_names: dict[int, str]
    lying: dict[str, Lying] = field(default_factory=dict)
    unfit: dict[str, UserError] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    def held_by(self, module: nn.Module) -> set[str]:
        """Names of a module's parameters."""
        return {self.parameter_names[id(p)] for p in module.parameters()}

    def without(self, dropped: dict[str, nn.Module]) -> Wiring:
        """What the others read when these are no blocks: what a block of them was made of."""
        through = {
            name: Read(read.parameters | self.held_by(dropped[name]), read.blocks, read.modules)
            for name, read in self.of_block.items()
            if name in dropped
        }

        def widened(read: Read) -> Read:
            parameters, blocks, modules = set(read.parameters), set(read.blocks), set(read.modules)
            while behind := blocks & set(through):
                for name in behind:
                    blocks.discard(name)
                    parameters |= through[name].parameters
                    blocks |= through[name].blocks
                    modules |= through[name].modules
            return Read(parameters, blocks, modules)

        return dataclasses.replace(
            self,
            of_block={n: widened(r) for n, r in self.of_block.items() if n not in dropped},
            of_logits=widened(self.of_logits),
        )


def watch(
    model: nn.Module,
    members: dict[str, nn.Module],
    inputs: Inputs,
    *,
    reads_outputs: bool = True,
    loose: Mapping[str, nn.Module] | None = None,
) -> Wiring:
    """Run the model, in evaluation mode, with its blocks cut off from each other.

    Arguments:
        model: any module; stays as it is.
        members: name -> module, or :class:`~.chain.Chain` of modules, of each block.
        inputs: of the model; a few images will do.
        reads_outputs: whether heads read the outputs, so that it matters how they lie.
        loose: name -> module, of those in no block whose readers are to be known too.

    Raises:
        UserError: the forward fails on these inputs.
    """
    watching = _Watch(model, members, reads_outputs)
    hooks = [
        module.register_forward_hook(watching.mark(name)) for name, module in (loose or {}).items()
    ]
    try:
        return watching.run(inputs)
    finally:
        for hook in hooks:
            hook.remove()


class _Watch:
    def __init__(
        self, model: nn.Module, members: dict[str, nn.Module], reads_outputs: bool
    ) -> None:
        self._model = model
        self._members = members
        self._reads_outputs = reads_outputs
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._handed_on: dict[int, tuple[Tensor, str]] = {}
        self._marks: dict[int, tuple[Tensor, str]] = {}
        self._num_images = 0
        self._look: Callable[[str, nn.Module, Any], None] = self._look_at
        # Outputs that may lie in several ways.
        self._undecided: dict[str, tuple[list[Layout], Tensor]] = {}
        self._wiring = Wiring({name: Read() for name in members}, Read(), self._parameters)

    def run(self, inputs: Inputs) -> Wiring:
        self._num_images = num_inputs(inputs)
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for name, module in self._members.items():
            forwards |= forwards_through(module, self._stand_in(name, module))
        with evaluating(self._model), standing_in(forwards), foreseeing_failure(inputs):
            output = call_model(self._model, inputs)
            self._wiring.of_logits = self._read(output)
            self._wiring.outputs = [tensor.detach() for tensor in tensors_of(output)]
            if self._undecided:
                self._look = self._decide
                call_model(self._model, rolled(inputs))
        return self._wiring

    def mark(self, name: str) -> Callable[..., Any]:
        """A forward hook by which what a module makes is known: a zero is added to it."""

        def marked(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            leaf = tensor.new_zeros(()).requires_grad_()
            self._marks[id(leaf)] = (leaf, name)
            return tensor + leaf

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return tree_map_only(Tensor, marked, output)

        return hook

    def _stand_in(self, name: str, module: nn.Module) -> Callable[..., Any]:
        halves = cut_at_head(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._wiring.of_block[name].add(self._read((args, kwargs)))
            args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            output = halves.activation(*args, **kwargs)
            if self._reads_outputs:
                self._look(name, module, output)
            if halves.downsample is not None:
                output = halves.downsample(output)
            return tree_map_only(Tensor, lambda t: self._hand_on(t, name), output)

        return forward

    def _look_at(self, name: str, module: nn.Module, output: Any) -> None:
        if name in self._wiring.lying:
            return
        try:
            read = read_output(output, name)
            layouts = [PLAIN]
            if not isinstance(module, Block):
                layouts = possible_layouts(name, module, read, self._num_images)
        except UserError as error:
            self._wiring.unfit[name] = error
        else:
            self._note_layout(name, layouts[0], read)
            if len(layouts) > 1:
                self._undecided[name] = layouts, read.detach().clone()

    def _decide(self, name: str, module: nn.Module, output: Any) -> None:
        """By where the images are that have changed places."""
        if name in self._undecided:
            layouts, before = self._undecided.pop(name)
            read = read_output(output, name)
            self._note_layout(name, fitting_layout(layouts, before, read, self._num_images), read)

    def _note_layout(self, name: str, layout: Layout, output: Tensor) -> None:
        self._wiring.lying[name] = Lying(layout, layout.view(output, self._num_images).shape)

    def _hand_on(self, tensor: Tensor, name: str) -> Tensor:
        """The tensor, from a leaf of its own, by which what reads it is known."""
        if not tensor.is_floating_point():
            return tensor
        leaf = tensor.detach().requires_grad_()
        self._handed_on[id(leaf)] = (leaf, name)
        return leaf.clone()  # the model may write into it

    def _read(self, value: Any) -> Read:
        """Parameters and blocks that the graphs of tensors lead to."""
        read = Read()
        seen: set[Any] = set()
        left: list[Any] = []
        for tensor in tensors_of(value):
            if tensor.grad_fn is not None:
                left.append(tensor.grad_fn)
            elif tensor.requires_grad:
                self._note(tensor, read)
        while left:
            node = left.pop()
            if node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                self._note(node.variable, read)
            left += [inner for inner, _ in node.next_functions if inner is not None]
        return read

    def _note(self, leaf: Tensor, read: Read) -> None:
        if id(leaf) in self._parameters:
            read.parameters.add(self._parameters[id(leaf)])
        elif id(leaf) in self._handed_on:
            read.blocks.add(self._handed_on[id(leaf)][1])
        elif id(leaf) in self._marks:
            read.modules.add(self._marks[id(leaf)][1])
