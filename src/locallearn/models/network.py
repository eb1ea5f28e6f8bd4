"""The common form of the package's networks: convolutional blocks, a pool, linear blocks, a
classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from locallearn.models.blocks import Block


class BlockNetwork(nn.Module):
    """conv blocks -> adaptive average pool -> linear blocks -> linear classifier.

    Blocks are named ``conv1``, ``conv2``, ..., ``linear1``, ... in the order of the forward.

    Arguments:
        conv_blocks: in order.
        pool_size: height and width that the last activation is pooled to before it is flattened.
        linear_blocks: in order; may be empty.
        num_classes: K.
        dropout: probability, applied to the input of every block but the first, and of the
            classifier. It acts between blocks and so belongs to none of them.
    """

    def __init__(
        self,
        conv_blocks: Sequence[Block],
        *,
        pool_size: int,
        linear_blocks: Sequence[Block] = (),
        num_classes: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self._conv_names = [f"conv{i}" for i in range(1, len(conv_blocks) + 1)]
        self._linear_names = [f"linear{i}" for i in range(1, len(linear_blocks) + 1)]
        for name, block in zip(self._conv_names, conv_blocks, strict=True):
            self.add_module(name, block)
        self.pool = nn.AdaptiveAvgPool2d(pool_size)
        for name, block in zip(self._linear_names, linear_blocks, strict=True):
            self.add_module(name, block)
        self.dropout = nn.Dropout(dropout)
        last = linear_blocks[-1].out_channels if linear_blocks else None
        self.num_features = last or conv_blocks[-1].out_channels * pool_size**2
        self.classifier = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) images to the classifier's input, (N, num_features)."""
        for name in self._conv_names:
            x = getattr(self, name)(x)
            if name != self._conv_names[-1]:
                x = self.dropout(x)
        x = self.dropout(self.pool(x)).flatten(1)
        for name in self._linear_names:
            x = self.dropout(getattr(self, name)(x))
        return x

    def forward_head(self, features: Tensor) -> Tensor:
        """(N, num_features) to logits (N, K)."""
        logits: Tensor = self.classifier(features)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
