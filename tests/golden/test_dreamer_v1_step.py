"""One full training step of Dreamer V1: states, losses, the gradient of every parameter, parameters afterwards."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from dreamer.models.conv_v1 import ConvEncoder, DeconvDecoder
from dreamer.models.gaussian_rssm import GaussianRSSM
from dreamer.models.heads_v1 import Head, TanhNormalActor
from dreamer.models.world_model import WorldModel
from dreamer.optimizers import TensorFlowAdam
from objectives.dreamer_v1 import DreamerV1Loss, DreamerV1ModelLoss, DynamicsActorValueLoss, imagined_returns
from tests.golden.reference import Golden, assert_near, load, prefixed, to_ours
from tests.golden.reference_v1 import (
    DECODER_NAMES,
    ENCODER_NAMES,
    HALF_LOG_2PI,
    RSSM_NAMES,
    assert_gradients,
    head_names,
    rearranged,
)

CASES = ("plain", "pcont")
HIDDEN_LAYERS = {"reward": 2, "pcont": 3, "value": 3, "actor": 4}


def parameter_names(case: str) -> dict[str, str]:
    model = "model.world_model"
    names = {
        **prefixed(f"{model}.encoders.pixels", ENCODER_NAMES),
        **prefixed(f"{model}.rssm", RSSM_NAMES),
        **prefixed(f"{model}.decoders.pixels", DECODER_NAMES),
        **prefixed(f"{model}.reward_head", head_names("reward", HIDDEN_LAYERS["reward"])),
        **prefixed("actor_value.critic", head_names("value", HIDDEN_LAYERS["value"])),
        **prefixed("actor_value.actor.head", head_names("actor", HIDDEN_LAYERS["actor"])),
    }
    if case == "pcont":
        names |= prefixed(f"{model}.continue_head", head_names("pcont", HIDDEN_LAYERS["pcont"]))
    return names


class Step:
    """The loss with the parameters and the noise of the reference, its batch, and what it imagines."""

    def __init__(self, case: str):
        self.case, self.golden, self.names = case, Golden("v1_losses"), parameter_names(case)
        c = self.config = self.golden.config[case]
        image_shape, feature_size, units = (64, 64, 3), c["deter"] + c["stoch"], c["units"]
        encoder = ConvEncoder(image_shape=image_shape, depth=c["cnn_depth"])
        latent = {"belief_size": c["deter"], "state_size": c["stoch"]}

        def head(name: str) -> Head:
            return Head(feature_size, 1, units=units, layers=HIDDEN_LAYERS[name])

        world_model = WorldModel(
            encoders={"pixels": encoder},
            rssm=GaussianRSSM(
                embed_size=encoder.out_features, action_size=c["actions"], hidden_size=c["hidden"], **latent
            ),
            decoders={"pixels": DeconvDecoder(**latent, image_shape=image_shape, depth=c["cnn_depth"])},
            reward_head=head("reward"),
            continue_head=head("pcont") if c["pcont"] else None,
        )
        horizon = 1 / (1 - c["discount"])
        weights = DreamerV1ModelLoss.WEIGHTS | {"model_kl": c["kl_scale"], "model_continue": c["pcont_scale"]}
        self.loss = DreamerV1Loss(
            DreamerV1ModelLoss(world_model, weights=weights, free_nats=c["free_nats"], horizon=horizon),
            DynamicsActorValueLoss(
                world_model,
                TanhNormalActor(feature_size, c["actions"], units=units),
                head("value"),
                imagination_horizon=c["horizon"],
                lmbda=c["disclam"],
                horizon=horizon,
            ),
        )
        self.world_model = world_model
        load(self.loss, rearranged(self.golden, f"{case}/param", c["stoch"]), self.names)
        self.inject()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.golden[f"{self.case}/{name}"]

    def inject(self) -> None:
        rssm, actor_value = self.world_model.rssm, self.loss.actor_value
        observe, imagine = rssm.observe, rssm.imagine

        def imagine_and_keep(*args):
            self.imagination = imagine(*args, noise=self["noise/imag_stoch"].transpose(0, 1))
            return self.imagination

        rssm.observe = lambda *args: observe(*args, noise=self["noise/post"])
        rssm.imagine = imagine_and_keep
        action_noise = self["noise/imag_action"]
        actor_value.act = lambda feature, step: actor_value.actor(feature.detach()).rsample(action_noise[step])

    def batch(self) -> TensorDict:
        shape = self["data/reward"].shape
        return TensorDict(
            {
                "pixels": self["data/image"],
                "action": self["data/action"],
                "reward": self["data/reward"].unsqueeze(-1),
                "terminated": self["data/discount"].unsqueeze(-1) == 0,
                "is_init": torch.zeros(*shape, 1, dtype=torch.bool),
            },
            shape,
        )

    def gradients(self, name: str) -> dict[str, torch.Tensor]:
        return rearranged(self.golden, f"{self.case}/{name}", self.config["stoch"])

    def groups(self) -> dict[str, list[nn.Parameter]]:
        parts = {"model": self.world_model, "actor": self.loss.actor_value.actor, "value": self.loss.actor_value.critic}
        return {name: list(module.parameters()) for name, module in parts.items()}


@pytest.mark.parametrize("case", CASES)
def test_model_states(case):
    step = Step(case)
    rollout = step.loss.model.observe(step.batch())
    for ours, theirs in (
        ("belief", "post_deter"),
        ("state", "post_stoch"),
        ("posterior_mean", "post_mean"),
        ("posterior_std", "post_std"),
        ("prior_mean", "prior_mean"),
        ("prior_std", "prior_std"),
    ):
        assert_near(getattr(rollout, ours), step[f"out/{theirs}"], 5e-6, theirs)
    assert_near(step.loss.model.kl(rollout), step["out/kl"], 5e-6)


@pytest.mark.parametrize("case", CASES)
def test_imagined_states(case):
    """The file is time-major, has the state before the belief, and leaves the start out."""
    step = Step(case)
    step.loss(step.batch())
    feature = step.imagination.feature[:, 1:]
    assert_near(feature.transpose(0, 1).roll(step.config["stoch"], -1), step["out/imag_feat"], 5e-6)
    assert_near(step.imagination.action.transpose(0, 1), step["out/imag_action"], 5e-6)
    actor_value = step.loss.actor_value
    reward, value = (head(feature).squeeze(-1) for head in (step.world_model.reward_head, actor_value.critic))
    continuation = actor_value.continuation(feature)
    assert_near(reward[:, :-1].T, step["out/imag_reward"], 5e-6)
    assert_near(continuation[:, :-1].T, step["out/imag_pcont"], 5e-6)
    assert_near(value.T, step["out/imag_value"], 5e-6)
    returns, weight = imagined_returns(reward, continuation, value, step.config["disclam"])
    assert_near(returns.T, step["out/returns"], 5e-6)
    assert_near(weight.T, step["out/discount_weight"], 5e-6)


@pytest.mark.parametrize("case", CASES)
def test_losses(case):
    step = Step(case)
    losses, batch = step.loss(step.batch()), step.batch()
    constant = HALF_LOG_2PI * batch["pixels"][0, 0].numel()
    likelihoods = {
        "like_image": -losses["loss_model_reco"] - constant,
        "like_reward": -losses["loss_model_reward"] - HALF_LOG_2PI,
    }
    if case == "pcont":
        likelihoods["like_pcont_scaled"] = -losses["loss_model_continue"]
    else:
        assert losses.get("loss_model_continue", None) is None
    for name, likelihood in likelihoods.items():
        assert_near(likelihood, step[f"loss/{name}"], 5e-6, name)
    total = losses["loss_model_kl"] - sum(likelihoods.values())
    constant_of_value = HALF_LOG_2PI * losses["ac", "weight_mean"]
    for ours, theirs in (
        (losses["loss_model_kl"], "div"),
        (losses["wm", "kl_value"], "div_raw"),
        (losses["wm", "prior_entropy"], "prior_ent"),
        (losses["wm", "posterior_entropy"], "post_ent"),
        (total, "model"),
        (losses["loss_actor"], "actor"),
        (losses["loss_value"] + constant_of_value, "value"),
    ):
        assert_near(ours, step[f"loss/{theirs}"], 5e-6, theirs)


@pytest.mark.parametrize("case", CASES)
def test_training_step(case):
    """One backward of the sum gives every group the gradient of its own loss alone."""
    step = Step(case)
    losses, c = step.loss(step.batch()), step.config
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    gradients = step.gradients("grad")
    assert gradients.keys() == set(step.names.values()), "every parameter has a reference gradient"
    assert_gradients(step.loss, gradients, step.names, 1e-4)
    for name, parameters in step.groups().items():
        norm = nn.utils.clip_grad_norm_(parameters, c["grad_clip"])
        assert_near(norm, step[f"norm/{name}"], 2e-5, name)
        TensorFlowAdam(parameters, lr=c[f"{name}_lr"]).step()
    after, ours_of = dict(step.loss.named_parameters()), {theirs: ours for ours, theirs in step.names.items()}
    for theirs, reference in step.gradients("after").items():
        error = (after[ours_of[theirs]].detach() - to_ours(reference)).abs()
        gradient = to_ours(gradients[theirs]).abs()
        group = {"actor": "actor", "value": "value"}.get(theirs.split("/")[0], "model")
        clear = gradient > 1e-4 * gradient.max()
        assert (error[clear] <= 2e-3 * c[f"{group}_lr"]).all(), theirs


@pytest.mark.parametrize(
    ("case", "of"), [*((case, of) for case in CASES for of in ("kl", "like_reward")), ("pcont", "like_pcont")]
)
def test_gradients_of_single_terms(case, of):
    step = Step(case)
    terms, rollout = step.loss.model.terms(step.batch())
    if of == "kl":
        step.loss.model.kl(rollout).mean().backward()
    else:
        (-terms[f"model_{'reward' if of == 'like_reward' else 'continue'}"].mean()).backward()
    assert_gradients(step.loss, step.gradients(f"grad_{of}"), step.names, 1e-4)


def test_no_gradient_of_the_kl_below_the_free_nats():
    step = Step("plain")
    terms, _ = step.loss.model.terms(step.batch())
    terms["model_kl"].backward()
    assert terms["model_kl"].item() == step.config["free_nats"] > step["loss/div_raw"]
    assert all(p.grad is None or not p.grad.any() for p in step.loss.parameters())


class TestAdam:
    def make_parameters(self, golden: Golden, case: str) -> list[nn.Parameter]:
        return [nn.Parameter(golden[f"{case}/init_{name}"]) for name in "ab"]

    def make_optimizer(self, golden: Golden, case: str, parameters: list[nn.Parameter]) -> TensorFlowAdam:
        c = golden.config
        return TensorFlowAdam(parameters, lr=c["lr"][case], beta1=c["beta_1"], beta2=c["beta_2"], eps=c["epsilon"])

    def update(self, golden: Golden, case: str, parameters, optimizer, t: int) -> None:
        for name, parameter in zip("ab", parameters, strict=True):
            parameter.grad = golden[f"{case}/grad_{name}"][t].clone()
        norm = nn.utils.clip_grad_norm_(parameters, golden.config["clip"])
        assert_near(norm, golden[f"{case}/norm"][t], 1e-6)
        optimizer.step()

    def assert_parameters(self, golden: Golden, case: str, parameters, t: int) -> None:
        for name, parameter in zip("ab", parameters, strict=True):
            error = (parameter.detach() - golden[f"{case}/param_{name}"][t]).abs().max()
            assert error <= 1e-2 * golden.config["lr"][case], (name, t)

    @pytest.mark.parametrize("case", ["default", "clipped", "wd", "tiny", "inf"])
    def test_steps(self, case):
        """Weight decay has no effect in the reference. The fourth gradient of "inf" is infinite, and skipped."""
        golden = Golden("v1_adam")
        parameters = self.make_parameters(golden, case)
        optimizer = self.make_optimizer(golden, case, parameters)
        for t in range(3 if case == "inf" else 10):
            self.update(golden, case, parameters, optimizer, t)
            self.assert_parameters(golden, case, parameters, t)

    def test_tiny_gradients_tell_it_from_pytorch(self):
        golden = Golden("v1_adam")
        parameters = self.make_parameters(golden, "tiny")
        optimizer = torch.optim.Adam(parameters, lr=golden.config["lr"]["tiny"], eps=golden.config["epsilon"])
        for t in range(10):
            self.update(golden, "tiny", parameters, optimizer, t)
        with pytest.raises(AssertionError):
            self.assert_parameters(golden, "tiny", parameters, 9)

    def test_goes_on_from_a_saved_state(self):
        golden = Golden("v1_adam")
        parameters = self.make_parameters(golden, "tiny")
        optimizer = self.make_optimizer(golden, "tiny", parameters)
        for t in range(10):
            self.update(golden, "tiny", parameters, optimizer, t)
            resumed = self.make_optimizer(golden, "tiny", parameters)
            resumed.load_state_dict(optimizer.state_dict())
            optimizer = resumed
        self.assert_parameters(golden, "tiny", parameters, 9)
