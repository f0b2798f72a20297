"""The MDN-RNN of World Models against the references.

They are hardmaru/WorldModelsExperiments@fd982b9 and ctallec/world-models@d6abd9c. The second is met by rearranging its
parameters and composing the same functions: actions come before latents, and one mixture covers all latents.
"""

import math

import pytest
import torch

from dreamer.models.mdn_rnn import MDNRNN, LSTMState, Mixture
from objectives.world_models import MDNRNNLoss, mixture_log_prob, normal_log_prob, terminated_bce
from tests.golden.reference import Golden, assert_near


def gates(array: torch.Tensor) -> torch.Tensor:
    """Gate order of the reference (input, candidate, forget, output) to ours, and back, along the first axis."""
    i, j, f, o = array.chunk(4)
    return torch.cat([i, f, j, o])


def load_mdn_rnn(golden: Golden, prefix: str, model: MDNRNN, end_first: bool = False) -> None:
    """Copy LSTM and output layer; the bias of the forget gate gets the 1 that the reference adds when it runs."""
    kernel, bias = gates(golden[f"{prefix}/kernel"].T), gates(golden[f"{prefix}/bias"]).clone()
    bias[model.hidden_size : 2 * model.hidden_size] += 1
    with torch.no_grad():
        model.lstm.weight_ih_l0.copy_(kernel[:, : -model.hidden_size])
        model.lstm.weight_hh_l0.copy_(kernel[:, -model.hidden_size :])
        model.lstm.bias_ih_l0.copy_(bias)
        model.head.weight.zero_()
        model.head.bias.zero_()
        if f"{prefix}/output_w" in golden.arrays:
            rows = output_rows(model, end_first)
            model.head.weight[rows] = golden[f"{prefix}/output_w"].T
            model.head.bias[rows] = golden[f"{prefix}/output_b"]


def output_rows(model: MDNRNN, end_first: bool) -> torch.Tensor:
    """Our output for each of theirs, which may begin with the end of the task."""
    mixture = torch.arange(3 * model.components * model.latent_size)
    return torch.cat([torch.tensor([len(mixture) + 1]), mixture]) if end_first else mixture


def assert_mdn_rnn(golden: Golden, prefix: str, model: MDNRNN, tolerance: float, end_first: bool = False) -> None:
    """Compare the gradients with those below ``prefix``."""
    lstm, rows = model.lstm, output_rows(model, end_first)
    kernel = torch.cat([lstm.weight_ih_l0.grad, lstm.weight_hh_l0.grad], 1)
    assert_near(gates(kernel).T, golden[f"{prefix}/kernel"], tolerance, "kernel")
    assert_near(gates(lstm.bias_ih_l0.grad), golden[f"{prefix}/bias"], tolerance, "bias")
    if f"{prefix}/output_w" in golden.arrays:
        assert_near(model.head.weight.grad[rows].T, golden[f"{prefix}/output_w"], tolerance, "output_w")
        assert_near(model.head.bias.grad[rows], golden[f"{prefix}/output_b"], tolerance, "output_b")


def test_lstm():
    golden = Golden("wm_lstm")
    x = golden["input"].requires_grad_()
    hidden = golden.config["hidden"]
    model = MDNRNN(latent_size=3, action_size=2, hidden_size=hidden)
    load_mdn_rnn(golden, "param", model)
    no_reset = torch.zeros(*x.shape[:2], 1, dtype=torch.bool)
    given = LSTMState(golden["init_h"], golden["init_c"])
    for case, start in (("zero", None), ("given", given)):
        _, state = model(x[..., :3], x[..., 3:], no_reset, start)
        assert_near(state.hidden, golden[f"{case}/final_h"], 5e-6)
        assert_near(state.cell, golden[f"{case}/final_c"], 5e-6)
        stepped = model.initial(len(x)) if start is None else start
        for t in range(x.shape[1]):
            stepped = model.step(x[:, t, :3], x[:, t, 3:], stepped)
            assert_near(stepped.hidden, golden[f"{case}/h"][:, t], 5e-6)
            assert_near(stepped.cell, golden[f"{case}/c"][:, t], 5e-6)
    (state.hidden * golden["cot_final_h"]).sum().backward()
    assert_mdn_rnn(golden, "given/grad", model, 1e-5)
    assert_near(x.grad, golden["given/grad_input"], 1e-5)


@pytest.mark.parametrize("case", ["normal", "extreme"])
def test_mixture_per_latent(case):
    golden = Golden("wm_mdn")
    raw, target = golden[f"hm/{case}/raw"].requires_grad_(), golden[f"hm/{case}/target"]
    mixture = Mixture(*raw.unflatten(0, target.shape).chunk(3, -1))
    assert_near(torch.log_softmax(mixture.logits, -1).flatten(0, 2), golden[f"hm/{case}/logmix"], 5e-6)
    nll = MDNRNNLoss(MDNRNN(action_size=1)).latent_nll(mixture, target)
    torch.testing.assert_close(nll, golden[f"hm/{case}/nll"], rtol=5e-6, atol=5e-6)
    assert_near(nll.mean(), golden[f"hm/{case}/cost"], 5e-6)
    nll.mean().backward()
    assert_near(raw.grad, golden[f"hm/{case}/grad_raw"], 1e-5)


@pytest.mark.parametrize("case", ["normal", "extreme"])
def test_one_mixture_over_all_latents(case):
    golden = Golden("wm_mdn")
    mean, log_std = golden[f"ct/{case}/mu"].requires_grad_(), golden[f"ct/{case}/logsigma"].requires_grad_()
    logits = golden[f"ct/{case}/logpi_raw"].requires_grad_()
    nll = -mixture_log_prob(logits, normal_log_prob(golden[f"ct/{case}/target"].unsqueeze(-2), mean, log_std).sum(-1))
    torch.testing.assert_close(nll, golden[f"ct/{case}/nll"], rtol=5e-6, atol=5e-6)
    assert_near(nll.mean(), golden[f"ct/{case}/loss"], 5e-6)
    nll.mean().backward()
    for tensor, name in ((mean, "mu"), (log_std, "logsigma"), (logits, "logpi_raw")):
        assert_near(tensor.grad, golden[f"ct/{case}/grad_{name}"], 1e-5, name)


def make_car_racing(golden: Golden) -> tuple[MDNRNN, torch.Tensor, torch.Tensor]:
    """The model with the reference's parameters, and its latents and actions."""
    c = golden.config["hm"]
    model = MDNRNN(latent_size=c["z"], action_size=c["actions"], hidden_size=c["rnn"], components=c["mixtures"])
    load_mdn_rnn(golden, "hm/model/param", model)
    return model, *golden["hm/model/input"].split([c["z"], c["actions"]], -1)


def car_racing_cost(model, latent, action, target):
    prediction, state = model(latent, action, torch.zeros(*latent.shape[:2], 1, dtype=torch.bool))
    return MDNRNNLoss(model).latent_nll(prediction.mixture, target).mean(), prediction.mixture, state


def test_mdn_rnn():
    golden = Golden("wm_mdn")
    model, latent, action = make_car_racing(golden)
    cost, mixture, state = car_racing_cost(model, latent, action, golden["hm/model/target"])
    assert_near(cost, golden["hm/model/cost"], 5e-6)
    assert_near(torch.log_softmax(mixture.logits, -1), golden["hm/model/logmix"], 5e-6)
    assert_near(mixture.mean, golden["hm/model/mean"], 5e-6)
    assert_near(mixture.log_std, golden["hm/model/logstd"], 5e-6)
    assert_near(state.hidden, golden["hm/model/final_h"], 5e-6)
    assert_near(state.cell, golden["hm/model/final_c"], 5e-6)
    cost.backward()
    assert_mdn_rnn(golden, "hm/model/grad", model, 1e-5)


@pytest.mark.parametrize("case", ["model", "train"])
def test_mdn_rnn_learns_as_the_reference(case):
    """One update and four, gradients clipped by value; the reference's eps is on the root before its correction."""
    golden = Golden("wm_mdn")
    c = golden.config["hm"]
    model, latent, action = make_car_racing(golden)
    after, rows = MDNRNN(latent_size=c["z"], action_size=c["actions"], hidden_size=c["rnn"]), output_rows(model, False)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=c["lr_used"])
    factors = golden["hm/train/target_scale"] if case == "train" else torch.ones(1)
    for step, factor in enumerate(factors, start=1):
        cost, _, _ = car_racing_cost(model, latent, action, golden["hm/model/target"] * factor)
        optimiser.zero_grad()
        cost.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), c["grad_clip_value"])
        optimiser.param_groups[0]["eps"] = c["adam_eps"] / math.sqrt(1 - 0.999**step)
        optimiser.step()
        if case == "train":
            assert_near(cost, golden["hm/train/cost"][step - 1], 5e-6)
        for name in ("output_w", "output_b", "kernel", "bias"):
            array = golden.arrays[f"hm/{case}/after/{name}"]
            golden.arrays[f"now/{name}"] = array[step - 1] if case == "train" else array
        load_mdn_rnn(golden, "now", after)
        for (name, ours), theirs in zip(model.named_parameters(), after.parameters(), strict=True):
            known = slice(0, len(rows)) if name.startswith("head") else slice(None)
            error = (ours - theirs)[known].abs()
            if ours.grad is None:
                assert not error.any()
                continue
            grad = ours.grad[known].abs()
            assert error[grad > 1e-4 * grad.max()].max() <= 1e-3 * c["lr_used"], (step, name)


def test_mdn_rnn_with_restarts():
    golden = Golden("wm_mdn")
    c = golden.config["doom"]
    model = MDNRNN(latent_size=c["z"], action_size=2, hidden_size=c["rnn"], components=c["mixtures"])
    load_mdn_rnn(golden, "doom/param", model, end_first=True)
    latent, restart = golden["doom/z"], golden["doom/restart"].float()
    action = torch.stack([golden["doom/action"].float(), restart], -1)
    assert restart[:, 1:-1].any(), "an episode begins inside a sequence"
    prediction, state = model(latent[:, :-1], action[:, :-1], restart[:, :-1, None] > 0.5)
    mixture = prediction.mixture
    assert_near(torch.log_softmax(mixture.logits, -1), golden["doom/logmix"], 5e-6)
    assert_near(mixture.mean, golden["doom/mean"], 5e-6)
    assert_near(mixture.log_std, golden["doom/logstd"], 5e-6)
    assert_near(prediction.terminated_logits, golden["doom/restart_logits"], 5e-6)
    assert_near(state.hidden, golden["doom/final_h"], 5e-6)
    assert_near(state.cell, golden["doom/final_c"], 5e-6)
    z_cost = MDNRNNLoss(model).latent_nll(mixture, latent[:, 1:]).mean()
    r_cost = terminated_bce(prediction.terminated_logits, restart[:, 1:], c["restart_factor"]).mean()
    assert_near(z_cost, golden["doom/z_cost"], 5e-6)
    assert_near(r_cost, golden["doom/r_cost"], 5e-6)
    assert_near(z_cost + r_cost, golden["doom/cost"], 5e-6)
    (z_cost + r_cost).backward()
    assert_mdn_rnn(golden, "doom/grad", model, 1e-5, end_first=True)


def load_second(model: MDNRNN, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    """Load the second reference's model; return the row of its output layer that each row of ours copies.

    Its outputs are means [K, L], log sigmas [K, L], logits [K], reward and end; its inputs are action and latent.
    """
    latents, k = model.latent_size, model.components
    grid = torch.arange(k * latents).view(k, latents).T  # [L, K]
    logits = (2 * k * latents + torch.arange(k)).expand(latents, k)
    rows = torch.stack([logits, grid, grid + k * latents], 1).flatten()  # [L, 3, K]
    rows = torch.cat([rows, 2 * k * latents + k + torch.arange(2)])
    lstm = model.lstm
    with torch.no_grad():
        model.head.weight.copy_(arrays["gmm_linear.weight"][rows])
        model.head.bias.copy_(arrays["gmm_linear.bias"][rows])
        lstm.weight_ih_l0.copy_(arrays["rnn.weight_ih_l0"].roll(-model.action_size, 1))
        lstm.weight_hh_l0.copy_(arrays["rnn.weight_hh_l0"])
        lstm.bias_ih_l0.copy_(arrays["rnn.bias_ih_l0"] + arrays["rnn.bias_hh_l0"])
    return rows


def test_mdn_rnn_of_the_second_reference():
    golden = Golden("wm_mdn")
    latent, action = golden["ct/model/latent"], golden["ct/model/action"]
    hidden = golden["ct/model/param/rnn.weight_hh_l0"].shape[1]
    model = MDNRNN(latent_size=latent.shape[-1], action_size=action.shape[-1], hidden_size=hidden)
    rows = load_second(model, golden.parameters("ct/model/param"))
    prediction, _ = model(latent, action, torch.zeros(*latent.shape[:2], 1, dtype=torch.bool))
    mean, log_std = (part.transpose(-1, -2) for part in prediction.mixture[1:])  # [B, T, K, L]
    logits = prediction.mixture.logits[..., 0, :]
    for ours, name in (
        (mean, "mus"),
        (log_std.exp(), "sigmas"),
        (torch.log_softmax(logits, -1), "logpi"),
        (prediction.reward, "rs"),
        (prediction.terminated_logits, "ds"),
    ):
        assert_near(ours.transpose(0, 1), golden[f"ct/model/{name}"], 5e-6, name)
    gmm = -mixture_log_prob(
        logits, normal_log_prob(golden["ct/model/next_latent"].unsqueeze(-2), mean, log_std).sum(-1)
    ).mean()
    bce = terminated_bce(prediction.terminated_logits, golden["ct/model/terminal"].float(), 1.0).mean()
    mse = (prediction.reward - golden["ct/model/reward"]).square().mean()
    for ours, name in ((gmm, "gmm"), (bce, "bce"), (mse, "mse")):
        assert_near(ours, golden[f"ct/model/with_reward/{name}"], 5e-6, name)
    loss = (gmm + bce + mse) / (model.latent_size + 2)
    assert_near(loss, golden["ct/model/with_reward/loss"], 5e-6)
    assert_near((gmm + bce) / (model.latent_size + 1), golden["ct/model/without_reward/loss"], 5e-6)
    loss.backward()
    for kind, grad in (("weight", model.head.weight.grad), ("bias", model.head.bias.grad)):
        reference = golden[f"ct/model/grad/gmm_linear.{kind}"]
        assert_near(torch.zeros_like(reference).index_add_(0, rows, grad), reference, 1e-5, kind)
    inputs = model.lstm.weight_ih_l0.grad.roll(model.action_size, 1)
    assert_near(inputs, golden["ct/model/grad/rnn.weight_ih_l0"], 1e-5)
    assert_near(model.lstm.weight_hh_l0.grad, golden["ct/model/grad/rnn.weight_hh_l0"], 1e-5)
    assert_near(model.lstm.bias_ih_l0.grad, golden["ct/model/grad/rnn.bias_ih_l0"], 1e-5)


def test_steps_of_the_second_reference():
    golden = Golden("wm_lstm")
    latent, action = golden["ct/latent"], golden["ct/action"]  # [T, B, ...]
    model = MDNRNN(latent_size=3, action_size=2, hidden_size=golden.config["hidden"], components=2)
    load_second(model, golden.parameters("ct/param"))
    state = model.initial(latent.shape[1])
    for t in range(len(latent)):
        state = model.step(latent[t], action[t], state)
        assert_near(state.hidden, golden["ct/h"][t], 5e-6)
        assert_near(state.cell, golden["ct/c"][t], 5e-6)
        prediction = model.predict(state.hidden)
        assert_near(prediction.mixture.mean.transpose(-1, -2), golden["ct/mus"][t], 5e-6)
        assert_near(prediction.mixture.log_std.exp().transpose(-1, -2), golden["ct/sigmas"][t], 5e-6)
        assert_near(prediction.reward, golden["ct/rs"][t], 5e-6)
        assert_near(prediction.terminated_logits, golden["ct/ds"][t], 5e-6)


def test_mixture_sampling():
    golden = Golden("wm_mdn_sampling")
    mixture = Mixture(golden["logmix"], golden["mean"], golden["logstd"])
    for row, temperature in enumerate(golden["tau"].tolist()):
        uniform, normal = golden["uniform"][row], golden["normal"][row]
        assert torch.equal(mixture.component(temperature, uniform), golden["index"][row].long())
        assert_near(mixture.sample(temperature, uniform, normal), golden["next_z"][row], 5e-6)
    tau = golden["tau"].unsqueeze(1)
    rows = Mixture(*(part.expand(len(tau), -1, -1) for part in mixture))
    assert_near(rows.sample(tau, golden["uniform"], golden["normal"]), golden["next_z"], 5e-6)
