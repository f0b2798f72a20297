"""The optimiser against the reference: adaptive gradient clipping, RMS scaling, momentum, warm-up."""

import pytest
import torch
from torchrl.trainers.algorithms import DreamerV3Optimizer

from tests.golden.reference import Golden, assert_near

CASES = ("default", "warmup4", "nowarmup_biglr", "noagc")


@pytest.mark.parametrize("case", CASES)
def test_optimizer(case):
    golden = Golden("optimizer")
    c = golden.config[case]
    assert c["momentum"] and c["schedule"] == "const" and not c["wd"]
    names = golden.names("param0")
    parameters = {name: torch.nn.Parameter(golden[f"param0/{name}"]) for name in names}
    optimizer = DreamerV3Optimizer(
        parameters.values(),
        lr=c["lr"],
        agc=c["agc"],
        beta1=c["beta1"],
        beta2=c["beta2"],
        eps=c["eps"],
        warmup_steps=c["warmup"],
    )
    for step in range(len(golden[f"grad/{names[0]}"])):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = golden[f"grad/{name}"][step]
        optimizer.step()
        for name, parameter in parameters.items():
            reference = golden[f"{case}/param/{name}"][step]
            allowed = 1e-4 * c["lr"] * (step + 1) + 2 * torch.finfo(torch.float32).eps * reference.abs()
            assert ((parameter - reference).abs() <= allowed).all(), (name, step)
            update = golden[f"{case}/update/{name}"][step]
            rounding = 2 * torch.finfo(torch.float32).eps * reference.abs().max()  # of the parameter difference
            error = (parameter.detach() - before[name] - update).abs().max()
            assert error <= 1e-4 * update.abs().max() + rounding, (name, step)


def test_first_update_has_learning_rate_zero():
    golden = Golden("optimizer")
    for name in golden.names("param0"):
        assert torch.equal(golden[f"default/param/{name}"][0], golden[f"param0/{name}"])
    assert_near(golden["default/update/m/kernel"][1] != 0, torch.ones(golden["param0/m/kernel"].shape), 0.0)
