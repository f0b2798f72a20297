import itertools

import pytest
import torch

from dreamer.models.controller import Controller
from dreamer.models.dream import dream, imagine, score
from dreamer.models.mdn_rnn import MDNRNN

Z, A, H = 3, 2, 8


def make_model() -> MDNRNN:
    torch.manual_seed(0)
    model = MDNRNN(latent_size=Z, action_size=A, hidden_size=H, components=4)
    torch.nn.init.constant_(model.head.bias[-1:], -5.0)  # no trial ends
    return model


def make_parts(population: int = 5, trials: int = 3, **arguments):
    controller = Controller(in_features=Z + H, action_size=A, **arguments)
    generator = torch.Generator().manual_seed(1)
    parameters = torch.randn(population, controller.num_parameters, generator=generator)
    return make_model(), controller, parameters, torch.randn(trials, Z, generator=generator)


def run(parts, length: int = 20, seed: int = 0, **arguments):
    generator = torch.Generator().manual_seed(seed)
    return score(dream(*parts, length=length, generator=generator, **arguments))


@pytest.mark.parametrize("arguments", [{}, {"discrete": True}, {"hidden_size": 4}])
def test_a_population_dreams_as_each_alone(arguments):
    model, controller, parameters, start = make_parts(**arguments)
    together = run((model, controller, parameters, start))
    for p in range(len(parameters)):
        alone = run((model, controller, parameters[p : p + 1], start))
        torch.testing.assert_close(together.returns[p], alone.returns[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(together.lengths[p], alone.lengths[0])


def test_noise_is_common_to_candidates_and_new_for_each_seed():
    model, controller, parameters, start = make_parts()
    same = (model, controller, parameters[:1].expand(5, -1), start[:1].expand(3, -1))
    scores = run(same)
    torch.testing.assert_close(scores.returns, scores.returns[:1].expand(5, -1))
    assert len(scores.returns[0].unique()) == 3, "trials have noise of their own"
    assert torch.equal(run(same).returns, scores.returns)
    assert not torch.allclose(run(same, seed=1).returns, scores.returns)


def test_the_controller_sees_what_came_before():
    """At the start h is 0; the action at t does not know what follows from it."""
    model, controller, parameters, start = make_parts(population=1, trials=1)
    steps = list(
        itertools.islice(
            dream(model, controller, parameters, start, length=2, generator=torch.Generator().manual_seed(0)), 2
        )
    )
    layers, state = controller.unflatten(parameters), model.initial(1)
    for step in steps:
        feature = torch.cat([step.latent[0], state.hidden], -1)
        torch.testing.assert_close(step.action, controller.act(layers, feature.unsqueeze(0)))
        state = model.step(step.latent[0], step.action[0], state)
        torch.testing.assert_close(step.reward[0], model.predict(state.hidden).reward)
    assert torch.equal(steps[0].latent[0], start)


class Countdown(MDNRNN):
    """Ends trial r at step r + 2 and gives a reward of 1 at each step, also after the end."""

    def predict(self, hidden):
        prediction = super().predict(hidden)
        self.steps = getattr(self, "steps", 0) + 1
        end = torch.where(self.steps == torch.arange(hidden.shape[1]) + 2, 1.0, -1.0).expand(hidden.shape[:-1])
        return prediction._replace(reward=torch.ones_like(prediction.reward), terminated_logits=end)


def test_what_comes_after_the_end_does_not_count():
    _, controller, parameters, start = make_parts(population=2, trials=4)
    model = Countdown(latent_size=Z, action_size=A, hidden_size=H)
    scores = run((model, controller, parameters, start), length=4)
    assert scores.lengths.tolist() == [[2, 3, 4, 4]] * 2
    assert torch.equal(scores.returns, scores.lengths.float()), "the step that ends a trial is rewarded"


def test_numbers_behind_the_end_need_not_be_finite():
    class Explodes(Countdown):
        def predict(self, hidden):
            prediction = super().predict(hidden)
            behind = self.steps > torch.arange(hidden.shape[1]) + 2
            return prediction._replace(reward=torch.where(behind, torch.nan, prediction.reward))

    _, controller, parameters, start = make_parts(population=2, trials=2)
    model = Explodes(latent_size=Z, action_size=A, hidden_size=H)
    assert run((model, controller, parameters, start), length=6).returns.tolist() == [[2, 3]] * 2


def test_a_dream_ends_when_all_have():
    _, controller, parameters, start = make_parts(population=2, trials=2)
    model = Countdown(latent_size=Z, action_size=A, hidden_size=H)
    assert run((model, controller, parameters, start), length=1000).lengths.tolist() == [[2, 3]] * 2
    assert model.steps == 50


def test_actions_that_were_recorded():
    model, _, _, start = make_parts()
    actions = torch.randn(6, A)
    generator = torch.Generator().manual_seed(0)
    starts = start.expand(2, *start.shape)
    steps = list(imagine(model, lambda z, h, t: actions[t].expand(2, 3, -1), starts, length=6, generator=generator))
    assert torch.equal(torch.stack([step.action[1, 2] for step in steps]), actions)
    assert torch.equal(steps[5].latent[0], steps[5].latent[1]), "noise is common to candidates"


def test_temperature():
    parts = make_parts()
    with pytest.raises(ValueError, match="above 0"):
        run(parts, temperature=0.0)
    rows = run(parts, temperature=torch.tensor([[0.5], [1.0], [1.0], [1.3], [2.0]])).returns
    assert torch.equal(rows[1:3], run(parts, temperature=1.0).returns[1:3])
    assert not torch.allclose(rows[4], run(parts, temperature=1.0).returns[4])


def test_an_empty_dream_has_no_score():
    with pytest.raises(ValueError, match="length"):
        run(make_parts(), length=0)
