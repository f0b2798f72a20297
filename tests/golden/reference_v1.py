"""What the arrays of danijar/dreamer@56d4d44 (MIT licence) are called here, and how close to them to be."""

import math

from torch import Tensor, nn

from tests.golden.reference import Golden, assert_near, linear, to_ours

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)  # the constant of a unit Gaussian, which our losses leave out
READ_FEATURES = ("dec/h1", "reward/h0", "value/h0", "pcont/h0", "actor/h0")

RSSM_NAMES = {
    **linear("hidden", "rssm/img1"),
    **linear("prior_head.0", "rssm/img2"),
    **linear("prior_head.2", "rssm/img3"),
    **linear("posterior_in", "rssm/obs1"),
    **linear("posterior_out", "rssm/obs2"),
    "gates_from_hidden.weight": "rssm/cell/kernel",
    "gates_from_belief.weight": "rssm/cell/recurrent_kernel",
    "gates_from_hidden.bias": "rssm/cell/bias/0",
    "gates_from_belief.bias": "rssm/cell/bias/1",
}
ENCODER_NAMES = {k: v for i in range(4) for k, v in linear(f"stages.{i}", f"enc/h{i + 1}").items()}
DECODER_NAMES = {
    **linear("inner", "dec/h1"),
    **{k: v for i in range(4) for k, v in linear(f"stages.{i}", f"dec/h{i + 2}").items()},
}


def head_names(reference: str, layers: int) -> dict[str, str]:
    names = linear(str(2 * layers), f"{reference}/hout")
    for i in range(layers):
        names |= linear(str(2 * i), f"{reference}/h{i}")
    return names


def rearranged(golden: Golden, prefix: str, state_size: int = 0) -> dict[str, Tensor]:
    """Arrays of parameters or gradients with the two biases of the GRU apart and belief before state in features."""
    arrays = golden.parameters(prefix)
    for name in list(arrays):
        if name.endswith("cell/bias"):
            arrays[f"{name}/0"], arrays[f"{name}/1"] = arrays.pop(name)
        elif name.endswith("/kernel") and name.removesuffix("/kernel") in READ_FEATURES:
            arrays[name] = arrays[name].roll(-state_size, 0)
    return arrays


def assert_gradients(
    module: nn.Module, arrays: dict[str, Tensor], names: dict[str, str], tolerance: float, sign: float = 1.0
) -> None:
    """Compare every stored gradient with that of the parameter of the same meaning."""
    parameters, ours_of = dict(module.named_parameters()), {theirs: ours for ours, theirs in names.items()}
    assert arrays
    for theirs, reference in arrays.items():
        grad = parameters[ours_of[theirs]].grad
        if grad is None:
            assert not reference.any(), f"{theirs} has no gradient"
        else:
            assert_near(sign * grad, to_ours(reference), tolerance, f"gradient of {theirs}")


def assert_each_near(actual: Tensor, reference: Tensor, tolerance: float) -> None:
    """|a - b| <= tolerance * (1 + |b|) for every element."""
    assert actual.shape == reference.shape
    assert ((actual - reference).abs() <= tolerance * (1 + reference.abs())).all()
