"""What docs/closed-form.md derives holds: its worked example, its program, its links."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "closed-form.md").read_text()

# Half a unit of the last of six decimals, and room for float64's own rounding.
_PRINTED = 0.5e-6 + 1e-13
# The arithmetic shown starts from rounded numbers: their factors sum to at most 8 (dL/dW).
_CARRIED = 8 * _PRINTED + _PRINTED


def _rows(columns: int) -> dict[str, list[str]]:
    """Name -> the other cells, of the worked example's tables with that many columns."""
    section = TEXT.split("## A worked example")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    return {row[0]: row[1:] for row in cells if len(row) == columns and "value" not in row}


def _numbers(cell: str) -> list[float]:
    return [float(number) for number in cell.split(";")]


GIVEN = {name: _numbers(value) for name, (value,) in _rows(2).items()}
SHOWN = _rows(3)


def _by_autograd() -> dict[str, Tensor]:
    """The example's quantities by their definitions, and gradients by float64 autograd."""

    def given(name: str, *shape: int) -> Tensor:
        return torch.tensor(GIVEN[name], dtype=torch.float64).view(shape)

    x = torch.stack([given(f"x, channel {c}", 2, 1, 2) for c in (1, 2)], dim=1)
    weight = given("W, input channels 1 and 2", 1, 2, 1, 1).requires_grad_()
    gamma, beta = given("gamma", 1).requires_grad_(), given("beta", 1).requires_grad_()
    projection = given("D, classes 0 and 1", 2, 1).requires_grad_()
    labels = given("y", 2).long()
    (slope,), (eps,), (tau,) = GIVEN["slope"], GIVEN["eps"], GIVEN["tau"]

    z = F.conv2d(x, weight)
    var, mean = torch.var_mean(z, correction=0)
    inv_std = (var + eps).rsqrt()
    xh = (z - mean) * inv_std
    v = gamma * xh + beta
    h = F.leaky_relu(v, slope)
    p = F.adaptive_avg_pool2d(h, 1).flatten(1)
    logits = p @ projection.T / tau
    loss = F.cross_entropy(logits, labels)
    for tensor in (z, v, h, p, logits):
        tensor.retain_grad()
    loss.backward()

    assert isinstance(v.grad, Tensor)
    assert isinstance(h.grad, Tensor)
    d = torch.where(v > 0, torch.ones_like(v), torch.full_like(v, slope))
    assert torch.equal(v.grad, d * h.grad)
    found = {
        "z": z,
        "mean": mean,
        "var": var,
        "inv_std": inv_std,
        "xh": xh,
        "v": v,
        "d": d,
        "h, by (1)": h,
        "S0, by (2)": d.mean((1, 2, 3)),
        "S1, by (3)": (d * xh).mean((1, 2, 3)),
        "p, by (4)": p,
        "p, mean of h": p,
        "L, by (7)": loss,
        "G, by (9)": p.grad,
        "dL/dbeta, by (16)": beta.grad,
        "dL/dbeta, by (19)": beta.grad,
        "dL/dgamma, by (15)": gamma.grad,
        "dL/dgamma, by (19)": gamma.grad,
    }
    for m in (0, 1):
        sample = f"of sample {m + 1}"
        found |= {
            f"logits {sample}": logits[m],
            f"softmax {sample}": logits[m].softmax(0),
            f"e {sample}": logits.grad[m] / tau,
            f"up(G) {sample}": h.grad[m],
            f"dL/dv {sample}": v.grad[m],
            f"dL/dD, class {m}": projection.grad[m],
            f"dL/dW, channel {m + 1}": weight.grad[0, m],
        }
        for i in (0, 1):
            found[f"dL/dz, sample {m + 1}, position {i + 1}"] = z.grad[m, 0, 0, i]
    return found


def test_worked_example_is_what_autograd_computes() -> None:
    found = _by_autograd()
    assert set(SHOWN) == set(found)
    for name, tensor in found.items():
        exact = tensor.detach().flatten().tolist()
        assert _numbers(SHOWN[name][1]) == pytest.approx(exact, rel=0, abs=_PRINTED), name


@pytest.mark.parametrize("name", SHOWN)
def test_arithmetic_shown_gives_the_value_beside_it(name: str) -> None:
    arithmetic, value = SHOWN[name]
    names = {"__builtins__": {}, "sqrt": math.sqrt, "exp": math.exp, "log": math.log}
    results = [eval(term, names) for term in arithmetic.strip("`").split(";")]
    assert results == pytest.approx(_numbers(value), rel=0, abs=_CARRIED)


def test_program_finds_autograd_s_gradients(capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for code in blocks:
        exec(code, {})
    errors = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert set(errors) == {"dL/dD", "dL/dgamma", "dL/dbeta", "dL/dz", "dL/dW"}
    for name, error in errors.items():
        assert float(error) < 1e-13, name


def test_slope_at_zero_is_pytorch_s() -> None:
    """Step 8."""
    v = torch.zeros(1, requires_grad=True)
    F.leaky_relu(v, 0.25).backward()
    assert v.grad == 0.25


def test_float_formats_are_as_the_numerics_say() -> None:
    assert torch.tensor(2**24 + 1).float().item() == 2**24
    assert torch.tensor(2**24 - 1).float().item() == 2**24 - 1
    mean = torch.tensor(4096.0)
    assert torch.nextafter(mean.bfloat16(), torch.tensor(8192.0).bfloat16()) == 4096 + 32


def test_formulas_are_numbered_in_order_and_cited_ones_exist() -> None:
    numbers = [int(number) for number in re.findall(r"^    .* {2,}\((\d+)\)$", TEXT, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    cited = re.findall(r"(?<!\w)\((\d+)\)", TEXT)
    assert {int(number) for number in cited} <= set(numbers)


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (DOCS / target).exists(), target
