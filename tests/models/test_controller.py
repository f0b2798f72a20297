import pytest
import torch

from dreamer.models.controller import Controller

ARCHITECTURES = [{}, {"hidden_size": 5}, {"bias": False}, {"discrete": True}, {"hidden_size": 5, "discrete": True}]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"in_features": 288, "action_size": 3}, 867),
        ({"in_features": 1088, "action_size": 1, "bias": False}, 1088),
        ({"in_features": 32, "action_size": 3, "hidden_size": 40}, 1443),
        ({"in_features": 288, "action_size": 6, "discrete": True}, 1734),
        ({"in_features": 288, "action_size": 4, "discrete": True}, 1156),
        ({"in_features": 288, "action_size": 5, "discrete": True}, 1445),
    ],
)
def test_number_of_parameters(arguments, expected):
    assert Controller(**arguments).num_parameters == expected


@pytest.mark.parametrize("arguments", ARCHITECTURES)
def test_flatten_is_the_inverse(arguments):
    controller = Controller(in_features=4, action_size=3, **arguments)
    parameters = torch.randn(2, controller.num_parameters)
    assert torch.equal(controller.flatten(controller.unflatten(parameters)), parameters)


def test_by_hand():
    """Biases 0.5 and -1 come first, then the two outputs of the first input."""
    controller = Controller(in_features=2, action_size=2)
    layers = controller.unflatten(torch.tensor([[0.5, -1.0, 1.0, 2.0, 3.0, 4.0]]))
    outputs = controller.outputs(layers, torch.tensor([[[1.0, -1.0]]]))
    assert outputs.tolist() == [[[0.5 + 1 - 3, -1 + 2 - 4]]]
    torch.testing.assert_close(controller.act(layers, torch.tensor([[[1.0, -1.0]]])), torch.tanh(outputs))


@pytest.mark.parametrize("arguments", ARCHITECTURES)
def test_a_population_acts_as_each_alone(arguments):
    controller = Controller(in_features=4, action_size=3, **arguments)
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(6, controller.num_parameters, generator=generator)
    feature = torch.randn(6, 2, 4, generator=generator)
    together = controller.act(controller.unflatten(parameters), feature)
    for p in range(6):
        alone = controller.act(controller.unflatten(parameters[p : p + 1]), feature[p : p + 1])
        torch.testing.assert_close(together[p], alone[0])


def test_discrete_actions_are_the_largest_output():
    controller = Controller(in_features=1, action_size=3, discrete=True, bias=False)
    action = controller.act(controller.unflatten(torch.tensor([[0.1, 50.0, 40.0]])), torch.ones(1, 1, 1))
    assert action.tolist() == [[[0.0, 1.0, 0.0]]]  # tanh would have made a draw of the last two


def test_a_vector_of_another_length():
    with pytest.raises(ValueError, match=r"\(1, 7\).*9"):
        Controller(in_features=2, action_size=3).unflatten(torch.zeros(1, 7))


def test_the_controller_of_z_does_not_see_h():
    latent, hidden = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    assert torch.equal(Controller(in_features=4, action_size=1).observe(latent, hidden), latent)
    both = Controller(in_features=9, action_size=1).observe(latent, hidden)
    assert torch.equal(both, torch.cat([latent, hidden], -1)), "z comes first"
