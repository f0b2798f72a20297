import math

import pytest
import torch

from dreamer.models.mdn_rnn import MDNRNN, Mixture


def make_model(**changes) -> MDNRNN:
    torch.manual_seed(0)
    model = MDNRNN(**({"latent_size": 3, "action_size": 2, "hidden_size": 8, "components": 4} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_inputs(rows: int = 2, steps: int = 50):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(rows, steps, 3, generator=generator)
    action = torch.randn(rows, steps, 2, generator=generator)
    return latent, action, torch.zeros(rows, steps, 1, dtype=torch.bool)


def test_parameters_of_the_paper():
    """422,368 without the two heads that are added, 257 parameters each."""
    model = MDNRNN(action_size=3)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 422_368 + 2 * 257
    assert not model.lstm.bias_hh_l0.any() and (model.lstm.bias_ih_l0[256:512] == 1).all()
    assert model.lstm.bias_ih_l0.sum() == 256


def test_stepping_is_the_sequence():
    model, (latent, action, is_init) = make_model(), make_inputs()
    is_init[0, 20] = is_init[1, 0] = is_init[1, 33] = True
    prediction, final = model(latent, action, is_init)
    state = model.initial(2)
    for t in range(latent.shape[1]):
        state = type(state)(*(part * ~is_init[:, t] for part in state))
        state = model.step(latent[:, t], action[:, t], state)
        torch.testing.assert_close(model.predict(state.hidden).mixture.mean, prediction.mixture.mean[:, t])
    torch.testing.assert_close(state, final)


def test_an_episode_forgets_the_one_before():
    model, (latent, action, is_init) = make_model(), make_inputs(rows=1, steps=10)
    is_init[:, 4] = True
    whole, _ = model(latent, action, is_init)
    latent[:, :4] += 1
    changed, _ = model(latent, action, is_init)
    assert torch.equal(whole.reward[:, 4:], changed.reward[:, 4:])
    assert not torch.equal(whole.reward[:, :4], changed.reward[:, :4])
    alone, _ = model(latent[:, 4:], action[:, 4:], is_init[:, 4:])
    torch.testing.assert_close(alone.reward, changed.reward[:, 4:])


def test_a_state_can_be_carried_on():
    model, inputs = make_model(), make_inputs()
    whole, _ = model(*inputs)
    _, state = model(*(part[:, :20] for part in inputs))
    rest, _ = model(*(part[:, 20:] for part in inputs), state)
    torch.testing.assert_close(rest.mixture.logits, whole.mixture.logits[:, 20:])


def test_autocast_leaves_the_state_alone():
    model, inputs = make_model(), make_inputs()
    _, expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        prediction, state = model(*inputs)
        stepped = model.step(inputs[0][:, 0], inputs[1][:, 0], model.initial(2))
    assert torch.equal(state.hidden, expected.hidden) and prediction.reward.dtype == torch.float32
    assert torch.equal(stepped.hidden, model.step(inputs[0][:, 0], inputs[1][:, 0], model.initial(2)).hidden)


def test_log_std_has_a_floor():
    model = make_model(min_log_std=-2.0)
    torch.nn.init.constant_(model.head.bias, -50.0)
    assert model.predict(torch.zeros(1, 8)).mixture.log_std.min() == -2.0


def test_logits_mean_and_log_std_are_told_apart():
    model = make_model()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(38.0))
    prediction = model.predict(torch.zeros(1, 8))
    assert prediction.mixture.logits[0, 0].tolist() == [0, 1, 2, 3]
    assert prediction.mixture.mean[0, 1].tolist() == [16, 17, 18, 19]
    assert prediction.mixture.log_std[0, 2].tolist() == [32, 33, 34, 35]
    assert (prediction.reward.item(), prediction.terminated_logits.item()) == (36, 37)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_moments_of_samples(temperature):
    """Weights softmax(logits / t); the variance within a component grows with t, not with its square."""
    logits, mean = torch.tensor([0.3, -0.5, 1.0]), torch.tensor([-1.0, 0.5, 2.0])
    log_std = torch.tensor([0.4, 0.8, 0.3]).log()
    p = torch.softmax(logits / temperature, 0)
    expected = (p * mean).sum()
    variance = (p * (temperature * (2 * log_std).exp() + mean**2)).sum() - expected**2
    n, generator = 200_000, torch.Generator().manual_seed(0)
    mixture = Mixture(*(part.expand(n, 1, 3) for part in (logits, mean, log_std)))
    z = mixture.sample(temperature, torch.rand(n, 1, generator=generator), torch.randn(n, 1, generator=generator))
    error = 5 * math.sqrt(variance / n)
    assert abs(z.mean() - expected) < error
    assert abs(z.var() - variance) < 0.02 * variance


def test_cold_samples_are_the_mean_of_the_likeliest():
    mixture = Mixture(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[1.0, 5.0, 9.0]]), torch.zeros(1, 3))
    z = mixture.sample(1e-8, torch.tensor([0.999]), torch.tensor([1.0]))
    torch.testing.assert_close(z, torch.tensor([5.0]), atol=1e-3, rtol=0)


def test_a_latent_far_below_another_is_sampled():
    """One maximum over all latents would leave the second with weights that are all zero."""
    logits = torch.tensor([[1000.0, 0.0], [-1000.0, -1000.0]])
    mixture = Mixture(logits, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.full((2, 2), -20.0))
    assert mixture.sample(1.0, torch.tensor([0.7, 0.7]), torch.zeros(2)).tolist() == [1.0, 4.0]


def test_rounding_does_not_leave_the_mixture():
    logits = torch.zeros(1, 7)
    mixture = Mixture(logits, torch.arange(7.0)[None], logits)
    assert mixture.component(1.0, torch.tensor([1.0])).item() == 6


def test_a_temperature_for_each_row():
    generator = torch.Generator().manual_seed(0)
    mixture = Mixture(*torch.randn(3, 2, 5, 4, generator=generator))
    uniform, normal = torch.rand(2, 5, generator=generator), torch.randn(2, 5, generator=generator)
    both = mixture.sample(torch.tensor([[0.5], [2.0]]), uniform, normal)
    for row, temperature in enumerate((0.5, 2.0)):
        alone = Mixture(*(part[row] for part in mixture)).sample(temperature, uniform[row], normal[row])
        torch.testing.assert_close(both[row], alone)
