"""Reading the reference arrays: where they lie, how closely to match them, and what their parameters are called here.

The arrays come from danijar/dreamerv3@e3f0224 (MIT licence), run in float32 on a CPU. Set ``GOLDEN_DIR`` to test
against another set of the same files.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "data")


class Golden:
    """The arrays of one file as tensors, and its config."""

    def __init__(self, name: str):
        with np.load(GOLDEN_DIR / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.config = json.loads(str(self.arrays.pop("config", "{}")))

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[key]))

    def names(self, prefix: str) -> list[str]:
        """Names of the arrays below ``prefix/``, without it."""
        return [key.removeprefix(f"{prefix}/") for key in self.arrays if key.startswith(f"{prefix}/")]

    def parameters(self, prefix: str = "param") -> dict[str, Tensor]:
        return {name: self[f"{prefix}/{name}"] for name in self.names(prefix)}


def assert_near(actual: Tensor, reference: Tensor, tolerance: float, what: str = "") -> None:
    """max|a - b| <= tolerance * max|b|, the measure the arrays are documented with."""
    actual, reference = actual.detach().double(), reference.double()
    assert actual.shape == reference.shape, f"{what}: {tuple(actual.shape)} is not {tuple(reference.shape)}"
    scale = reference.abs().max().item()
    error = (actual - reference).abs().max().item()
    assert error <= tolerance * scale, f"{what}: error {error:.3g} of {scale:.3g}, allowed {tolerance:g} relative"


def linear(ours: str, jax: str) -> dict[str, str]:
    return {f"{ours}.weight": f"{jax}/kernel", f"{ours}.bias": f"{jax}/bias"}


def norm(ours: str, jax: str) -> dict[str, str]:
    return {f"{ours}.norm.scale": f"{jax}/scale"}


def mlp(ours: str, jax: str, layers: int) -> dict[str, str]:
    """The reference's MLP module: layers named linear<i> and norm<i>."""
    names = {}
    for i in range(layers):
        names |= linear(f"{ours}.{i}.0", f"{jax}/linear{i}") | norm(f"{ours}.{i}.1", f"{jax}/norm{i}")
    return names


def stages(ours: str, jax: list[str]) -> dict[str, str]:
    """Numbered layers whose norm is called <layer>norm."""
    names = {}
    for i, layer in enumerate(jax):
        names |= linear(f"{ours}.{i}.0", layer) | norm(f"{ours}.{i}.1", f"{layer}norm")
    return names


def rssm_names(prior_layers: int = 2) -> dict[str, str]:
    names = {}
    for ours, jax in (("from_belief", "dynin0"), ("from_state", "dynin1"), ("from_action", "dynin2")):
        names |= linear(f"{ours}.0", f"dyn/{jax}") | norm(f"{ours}.1", f"dyn/{jax}norm")
    names |= linear("hidden", "dyn/dynhid0") | norm("hidden_norm", "dyn/dynhid0norm") | linear("gates", "dyn/dyngru")
    names |= stages("prior_head.0", [f"dyn/prior{i}" for i in range(prior_layers)])
    names |= linear("prior_head.1", "dyn/priorlogit")
    names |= linear("posterior_in", "dyn/obs0") | norm("posterior_head.0", "dyn/obs0norm")
    return names | linear("posterior_head.2", "dyn/obslogit")


def image_encoder_names(depth: int) -> dict[str, str]:
    return stages("stages", [f"enc/cnn{i}" for i in range(depth)])


def image_decoder_names(depth: int) -> dict[str, str]:
    names = linear("from_belief", "dec/sp0") | linear("from_state.0", "dec/sp1") | norm("from_state.1", "dec/sp1norm")
    names |= linear("from_state.2", "dec/sp2") | norm("norm", "dec/spnorm") | linear("out", "dec/imgout")
    return names | stages("stages", [f"dec/conv{i}" for i in reversed(range(depth - 1))])


def vector_encoder_names(layers: int) -> dict[str, str]:
    return stages("mlp", [f"enc/mlp{i}" for i in range(layers)])


def vector_decoder_names(layers: int, key: str) -> dict[str, str]:
    return mlp("mlp", "dec/mlp", layers) | linear("out", f"dec/vec/{key}/pred")


def head_names(jax: str, layers: int, output: str) -> dict[str, str]:
    return mlp("0", f"{jax}/mlp", layers) | linear("1", f"{jax}/head/{output}")


def actor_names(jax: str, layers: int, discrete: bool) -> dict[str, str]:
    outputs = {"logits": "logits"} if discrete else {"mean": "mean", "std": "stddev"}
    names = mlp("mlp", f"{jax}/mlp", layers)
    for ours, theirs in outputs.items():
        names |= linear(ours, f"{jax}/head/action/{theirs}")
    return names


def prefixed(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{ours}": jax for ours, jax in names.items()}


def to_ours(array: Tensor) -> Tensor:
    """A reference kernel in our layout: linear (in, out) -> [out, in], conv (kh, kw, in, out) -> [out, in, kh, kw]."""
    if array.ndim == 2:
        return array.T
    return array.permute(3, 2, 0, 1) if array.ndim == 4 else array


def load(module: nn.Module, arrays: dict[str, Tensor], names: dict[str, str]) -> None:
    """Copy reference parameters into ``module``; every parameter must be named exactly once."""
    parameters = dict(module.named_parameters())
    assert parameters.keys() == names.keys(), parameters.keys() ^ names.keys()
    with torch.no_grad():
        for ours, jax in names.items():
            assert parameters[ours].shape == to_ours(arrays[jax]).shape, (ours, jax)
            parameters[ours].copy_(to_ours(arrays[jax]))


def assert_gradients(module: nn.Module, golden: Golden, prefix: str, names: dict[str, str], tolerance: float) -> None:
    """Compare every stored gradient below ``prefix`` with that of the parameter of the same meaning."""
    parameters, jax_to_ours = dict(module.named_parameters()), {jax: ours for ours, jax in names.items()}
    stored = golden.names(prefix)
    assert stored, f"no gradients below {prefix}"
    for jax in stored:
        grad = parameters[jax_to_ours[jax]].grad
        reference = to_ours(golden[f"{prefix}/{jax}"])
        if grad is None:
            assert not reference.any(), f"{jax} has no gradient"
            continue
        assert_near(grad, reference, tolerance, f"gradient of {jax}")
