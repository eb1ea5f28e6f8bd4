"""`schedulefree_step`; see `kernels.interface`."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from locallearn.kernels.cuda.common import MAX_THREADS, program_of, vector_of
from locallearn.kernels.cuda.compilation import Program
from locallearn.kernels.cuda.launching import address, launch
from locallearn.kernels.device_layout import Quadruple, ceil_div, quadruples_of
from locallearn.kernels.interface import ScheduleFreeState

MAX_PARAMETERS = 48  # of a launch


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("addresses", (ctypes.c_void_p * MAX_PARAMETERS) * 4),
        ("sizes", ctypes.c_longlong * MAX_PARAMETERS),
        ("first_blocks", ctypes.c_int * (MAX_PARAMETERS + 1)),
    )


class _Clock(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ScheduleFreeState._fields)


class _Adam(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_float) for name in ("beta2", "one_minus_beta2", "eps", "weight_decay")
    )


@torch.no_grad()
def schedulefree_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    z: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    state: ScheduleFreeState,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    averages_by_bias_correction: bool = False,
) -> None:
    quadruples = quadruples_of("cuda", parameters, gradients, z, exp_avg_sq)
    scalars = torch.empty(4, dtype=torch.float32, device=state.step.device)
    beta1, beta2 = betas
    launch(
        _program(4),
        "advance",
        (1,),
        (1,),
        _Clock(*map(address, state)),
        scalars,
        *map(
            ctypes.c_double,
            (beta1, math.log(beta2) if beta2 else -math.inf, warmup_steps, r, weight_lr_power),
        ),
        int(averages_by_bias_correction),
    )
    adam = _Adam(beta2, 1 - beta2, eps, weight_decay)
    for first in range(0, len(quadruples), MAX_PARAMETERS):
        _step(quadruples[first : first + MAX_PARAMETERS], scalars, adam)


def _program(vector: int) -> Program:
    return program_of("schedulefree_step.cu", torch.float32, vector, MAX_PARAMETERS=MAX_PARAMETERS)


def _step(group: Sequence[Quadruple], scalars: Tensor, adam: _Adam) -> None:
    vector = vector_of(4, *itertools.chain.from_iterable(group))
    values_of_a_block = MAX_THREADS * vector
    arguments = _Parameters()
    num_blocks = 0
    for i, quadruple in enumerate(group):
        for column, tensor in zip(arguments.addresses, quadruple, strict=True):
            column[i] = address(tensor)
        arguments.sizes[i] = quadruple[0].numel()
        arguments.first_blocks[i] = num_blocks
        num_blocks += ceil_div(quadruple[0].numel(), values_of_a_block)
    arguments.first_blocks[len(group)] = num_blocks
    launch(
        _program(vector),
        "schedulefree_step",
        (num_blocks,),
        (MAX_THREADS,),
        arguments,
        scalars,
        adam,
    )
