"""Which modules of an unknown model are its blocks: the policy "auto".

A model is read from one watched forward (`trace`), from the outside in:

1. A module that holds one layer with weights is a block: a conv-BN-ReLU module, a patch merger.
2. A class that repeats in a stage (a Sequential, ModuleList or ModuleDict that holds two or more
   of it, each with several layers) is a unit: a residual block, an inverted residual, a
   transformer layer. What holds units is a stage, and is looked into.
3. A module that runs more than once, or whose class occurs more than once, is a block. So is one
   of few layers, unless these are all but the output layer. Another one wraps the rest, and is
   looked into.
4. Layers that lie in none of these, and run one straight after the other, form chains: a layer
   with weights, and the norm and activation behind it. A layer that neither has, in front of a
   block (a patch embedding), learns with that block.

What makes the logits is the output layer and no block. Whatever is left (class tokens, position
embeddings) learns with the block that reads it (`planning`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set

from torch import nn

from locallearn.engine.blocks.trace import Call
from locallearn.errors import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_FEW_LAYERS = 4  # a module that occurs once, and holds so many, is a block and no wrapper


def automatic(
    model: nn.Module,
    calls: dict[str, Call],
    *,
    unfit: Set[str] = frozenset(),
    allow_reuse: bool = False,
) -> list[tuple[str, ...]]:
    """The blocks of a model by the policy above, in the order of the forward; the output layer
    is still among them. Each is the names of its modules: one, or a chain.

    Arguments:
        model: any module.
        calls: a trace of it.
        unfit: names of modules that can't be blocks, since their outputs don't have an entry for
            each image.
        allow_reuse: whether a block may run more than once in a forward.

    Raises:
        UserError: a block to be runs more than once in a forward and may not.
    """
    return _Reader(model, calls, unfit, allow_reuse).read()


class _Reader:
    def __init__(
        self,
        model: nn.Module,
        calls: dict[str, Call],
        unfit: Set[str],
        allow_reuse: bool,
    ) -> None:
        self._model = model
        self._calls = calls
        self._unfit = unfit
        self._allow_reuse = allow_reuse
        self._num_layers = {module: _count_layers(module) for module in model.modules()}
        self._units = self._unit_classes()
        self._occurrences = Counter(
            type(call.module)
            for name, call in calls.items()
            if name and self._num_layers[call.module] > 1
        )

    def read(self) -> list[tuple[str, ...]]:
        blocks: list[str] = []
        loose: list[str] = []
        for name, is_block in self._visit("", self._model):
            (blocks if is_block else loose).append(name)
        found: list[tuple[str, ...]] = [(name,) for name in blocks]
        found += self._chains(loose, set(blocks))
        return sorted(found, key=lambda names: self._calls[names[0]].start)

    def _visit(self, path: str, module: nn.Module) -> Iterator[tuple[str, bool]]:
        """(name, whether it is a block) of what is inside: blocks, and layers that are in none."""
        for child_name, child in module.named_children():
            name = f"{path}.{child_name}" if path else child_name
            call = self._calls.get(name)
            if call is None:
                if not any(other.startswith(name + ".") for other in self._calls):
                    continue  # it does not run, or is known by another name
            elif call.is_leaf:
                yield name, False
                continue
            elif self._is_block(child, call):
                yield name, True
                continue
            yield from self._visit(name, child)

    def _is_block(self, module: nn.Module, call: Call) -> bool:
        if not is_trained(module) or not call.has_grad:
            return False
        if not _has_features(call) or call.name in self._unfit:
            return False
        is_block = self._is_unit(module, call)
        if is_block and call.num_calls > 1 and not self._allow_reuse:
            raise reuse_error(call)
        return is_block

    def _is_unit(self, module: nn.Module, call: Call) -> bool:
        num_layers = self._num_layers[module]
        if num_layers <= 1:
            return num_layers == 1 and self._shapes_its_output(module)
        if any(type(inner) in self._units for inner in module.modules() if inner is not module):
            return False
        if isinstance(module, _CONTAINERS):
            return type(module) in self._units
        if any(type(inner) is type(module) for inner in module.modules() if inner is not module):
            return False
        in_model = self._num_layers[self._model]
        is_small = num_layers <= max(_FEW_LAYERS, in_model // 8) and num_layers < in_model - 1
        return self._occurrences[type(module)] > 1 or call.num_calls > 1 or is_small

    @staticmethod
    def _shapes_its_output(module: nn.Module) -> bool:
        return any(isinstance(m, _NORMS) or is_activation(m) for m in module.modules())

    def _unit_classes(self) -> set[type[nn.Module]]:
        """Classes of which a container holds two or more, each with several layers."""
        units: set[type[nn.Module]] = set()
        for container in self._model.modules():
            if not isinstance(container, _CONTAINERS):
                continue
            kinds = Counter(
                type(child)
                for child in container.children()
                if type(child) not in _CONTAINERS and self._num_layers.get(child, 0) > 1
            )
            units |= {kind for kind, number in kinds.items() if number > 1}
        return units

    def _chains(self, loose: Sequence[str], blocks: set[str]) -> list[tuple[str, ...]]:
        """Chains of loose layers, cut where another one with weights begins."""
        starts = sorted((self._calls[name].start, name) for name in (*loose, *blocks))
        order = [name for _, name in starts]
        chains: list[list[str]] = []
        chain: list[str] = []
        for name in order:
            call = self._calls[name]
            joins = name not in blocks and self._continues(chain, call)
            if not joins:
                chains.append(chain)
                chain = []
            is_taught = call.has_grad and (joins or is_trained(call.module))
            if name not in blocks and is_taught and call.num_calls == 1:
                chain.append(name)
        chains.append(chain)
        found = []
        for names in chains:
            kept = self._trimmed(names)
            is_fit = not any(name in self._unfit for name in kept)
            if kept and is_fit and self._learns_alone(kept, order, blocks):
                found.append(tuple(kept))
        return found

    def _continues(self, chain: Sequence[str], call: Call) -> bool:
        """Whether a layer runs on the output of the chain's last, and on nothing else.

        One with hooks does not join: the chain's first runs it by its forward alone.
        """
        if not chain or call.num_calls > 1:
            return False
        first, module = self._calls[chain[0]].module, call.module
        if first._forward_hooks or module._forward_pre_hooks or module._forward_hooks:
            return False
        has_weights = any(self._has_weights(name) for name in chain)
        if has_weights and self._num_layers[call.module] > 0:
            return False
        outputs = self._calls[chain[-1]].outputs
        return len(outputs) == 1 and len(call.inputs) == 1 and outputs[0].is_same(call.inputs[0])

    def _trimmed(self, names: Sequence[str]) -> list[str]:
        """Without what stands behind the last layer with parameters or activation (a pool, a
        dropout): that runs between blocks."""
        kept = list(names)
        while kept:
            call = self._calls[kept[-1]]
            has_parameters = any(True for _ in call.module.parameters())
            if (has_parameters or is_activation(call.module)) and _has_features(call):
                return kept
            kept.pop()
        return kept

    def _learns_alone(self, names: Sequence[str], order: Sequence[str], blocks: set[str]) -> bool:
        modules = [self._calls[name].module for name in names]
        if not any(self._has_weights(name) for name in names):
            return False
        if isinstance(modules[0], nn.Embedding | nn.EmbeddingBag):
            return False
        if any(isinstance(m, (*_NORMS, *_RECURRENT)) or is_activation(m) for m in modules):
            return True
        # A linear map in front of a block: nothing of its own to learn from.
        behind = [name for name in order[order.index(names[-1]) + 1 :] if self._has_weights(name)]
        return not (behind and behind[0] in blocks)

    def _has_weights(self, name: str) -> bool:
        return self._num_layers[self._calls[name].module] > 0


def _count_layers(module: nn.Module) -> int:
    """Layers with weights: modules with a parameter of two or more dimensions of their own."""
    return sum(
        any(p.ndim > 1 for p in inner.parameters(recurse=False)) for inner in module.modules()
    )


def is_trained(module: nn.Module) -> bool:
    """Whether a parameter of it requires a gradient."""
    return any(p.requires_grad for p in module.parameters())


def is_activation(module: nn.Module) -> bool:
    """Whether a module without parameters or with few is a nonlinearity, torch's or another's."""
    kind = type(module)
    is_attention = isinstance(module, nn.MultiheadAttention)
    return "activation" in kind.__module__ and not is_attention


def _has_features(call: Call) -> bool:
    """Whether it yields a floating tensor of two or more dimensions."""
    return any(s.tensor.is_floating_point() and s.tensor.ndim > 1 for s in call.outputs)


def reuse_error(call: Call) -> UserError:
    """What to say of a block that runs more than once in a forward."""
    return UserError(
        f"block {call.name!r} runs {call.num_calls} times in one forward; a block is updated as "
        f"soon as it has run. Let it learn each time (allow_reuse=True), or choose other blocks "
        f"(blocks=[...]), such as the module around it."
    )
