"""One full training step of the reference agent: losses, the gradient of every parameter, parameters afterwards."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch.nn import functional as F
from torchrl.trainers.algorithms import DreamerV3Optimizer

from dreamer.agents.parts import make_actor, make_critic, make_world_model
from objectives import DreamerV3Loss, ImaginedActorCriticLoss, ReplayCriticLoss, WorldModelLoss
from objectives.functional import twohot_mean
from tests.golden import reference as ref
from tests.golden.reference import Golden, assert_gradients, assert_near, load, prefixed

CASES = ("agent_step_cont", "agent_step_disc")
TOKENS = {"image": "pixels", "vec": "observation"}


def parameter_names(c: dict) -> dict[str, str]:
    stages, layers = len(c["enc_dec_mults"]), c["layers"]
    model = "model.world_model"
    return {
        **prefixed(f"{model}.encoders.observation", ref.vector_encoder_names(c["enc_layers"])),
        **prefixed(f"{model}.encoders.pixels", ref.image_encoder_names(stages)),
        **prefixed(f"{model}.decoders.observation", ref.vector_decoder_names(c["dec_layers"], "vec")),
        **prefixed(f"{model}.decoders.pixels", ref.image_decoder_names(stages)),
        **prefixed(f"{model}.rssm", ref.rssm_names()),
        **prefixed(f"{model}.reward_head", ref.head_names("rew", layers["rew"], "logits")),
        **prefixed(f"{model}.continue_head", ref.head_names("con", layers["con"], "logit")),
        **prefixed("actor_critic.actor", ref.actor_names("pol", layers["pol"], c["discrete"])),
        **prefixed("actor_critic.critic", ref.head_names("val", layers["val"], "logits")),
        **prefixed("actor_critic.slow_critic", ref.head_names("slowval", layers["val"], "logits")),
    }


def make_loss(golden: Golden) -> DreamerV3Loss:
    c = golden.config
    assert not c["ac_grads"] and c["contdisc"] and c["reward_grad"] and c["repval_grad"] and c["imag_last"] == 0
    assert c["layers"] == {"con": 1, "pol": 3, "rew": 1, "val": 3} and c["enc_layers"] == c["dec_layers"]
    model = make_world_model(
        observations={"pixels": golden["data/image"].shape[2:], "observation": golden["data/vec"].shape[2:]},
        action_size=c["actions"],
        belief_size=c["deter"],
        hidden_size=c["hidden"],
        classes=c["classes"],
        categoricals=c["stoch"],
        blocks=c["blocks"],
        depth=c["depth"],
        units=c["units"],
        layers=c["enc_layers"],
        multipliers=tuple(c["enc_dec_mults"]),
        unimix=c["unimix"],
    )
    feature_size, scales = c["deter"] + c["stoch"] * c["classes"], c["loss_scales"]
    actor = make_actor(feature_size, c["actions"], units=c["units"], discrete=c["discrete"])
    critic = make_critic(feature_size, units=c["units"])
    model_weights = {
        "model_reco": scales["rec"],
        "model_reward": scales["rew"],
        "model_continue": scales["con"],
        "model_dynamic": scales["dyn"],
        "model_representation": scales["rep"],
    }
    model_loss = WorldModelLoss(model, weights=model_weights, free_nats=c["free_nats"], horizon=c["horizon"])
    actor_critic = ImaginedActorCriticLoss(
        model,
        actor,
        critic,
        weights={"actor": scales["policy"], "value": scales["value"]},
        imagination_horizon=c["imag_length"],
        lmbda=c["imag_loss"]["lam"],
        entropy_scale=c["imag_loss"]["actent"],
        slow_regularizer=c["imag_loss"]["slowreg"],
        slow_critic_rate=c["slowvalue"]["rate"],
        return_norm_rate=c["retnorm"]["rate"],
    )
    replay_critic = ReplayCriticLoss(
        critic,
        actor_critic.slow_critic,
        weights={"value_replay": scales["repval"]},
        horizon=c["horizon"],
        lmbda=c["repl_loss"]["lam"],
        slow_regularizer=c["repl_loss"]["slowreg"],
    )
    loss = DreamerV3Loss(model_loss, actor_critic, replay_critic)
    load(loss, golden.parameters(), parameter_names(c))
    actor_critic.return_norm.low.fill_(golden["before/retnorm/lo/value"].item())
    actor_critic.return_norm.high.fill_(golden["before/retnorm/hi/value"].item())
    inject(golden, loss)
    return loss


def inject(golden: Golden, loss: DreamerV3Loss) -> None:
    """Let the loss draw the samples that the reference drew."""
    rssm, actor_critic = loss.model.world_model.rssm, loss.actor_critic
    observe, imagine = rssm.observe, rssm.imagine
    rssm.observe = lambda *args: observe(*args, noise=golden["cap/rep_stoch"])
    rssm.imagine = lambda *args: imagine(*args, noise=golden["cap/img_stoch"])
    action = actions(golden, "cap/imag_act")
    actor_critic.act = lambda feature, step: action[:, step]


def actions(golden: Golden, name: str) -> torch.Tensor:
    if golden.config["discrete"]:
        return F.one_hot(golden[name].long(), golden.config["actions"]).float()
    return golden[name]


def make_batch(golden: Golden) -> TensorDict:
    """The reference's rows 0..T as a replay sample: T records, and the latents of row 0 as context.

    A record holds the action that led to it, the reference's row the action taken in it: row t - 1 gives record t.
    """
    row = lambda name: golden[f"data/{name}"][:, 1:].unsqueeze(-1)  # noqa: E731
    stoch = golden["data/dyn/stoch"][:, 0]
    assert torch.equal(F.one_hot(stoch.argmax(-1), stoch.shape[-1]).float(), stoch)
    return TensorDict(
        {
            "pixels": golden["data/image"][:, 1:],
            "observation": golden["data/vec"][:, 1:],
            "action": actions(golden, "data/action")[:, :-1],
            "reward": row("reward"),
            "is_init": row("is_first").bool(),
            "done": row("is_last").bool(),
            "terminated": row("is_terminal").bool(),
            "context": TensorDict({"belief": golden["data/dyn/deter"][:, 0], "state": stoch.argmax(-1)}, len(stoch)),
        },
        len(stoch),
    )


@pytest.mark.parametrize("name", CASES)
def test_terms(name):
    golden, batch = Golden(name), make_batch(Golden(name))
    loss = make_loss(golden)
    assert_near(loss.model.world_model.encode(batch), golden["cap/tokens"], 1e-5)
    terms, rollout = loss.model.terms(batch)
    assert_near(rollout.belief, golden["cap/rep_deter"], 1e-5)
    assert torch.equal(rollout.state, golden["cap/rep_stoch"].flatten(-2))
    for ours, jax in (("dynamic", "dyn"), ("representation", "rep"), ("reward", "rew"), ("continue", "con")):
        assert_near(terms[f"model_{ours}"], golden[f"cap/outs_{jax}"], 1e-5, jax)
    assert_near(terms["model_reco"], golden["cap/outs_image"] + golden["cap/outs_vec"], 1e-5)
    imagined_terms, imagined = loss.actor_critic.terms(rollout.belief, rollout.state)
    assert_near(imagined_terms["actor"], golden["cap/imag_policy_loss"], 1e-5)
    assert_near(imagined_terms["value"], golden["cap/imag_value_loss"], 1e-5)
    assert_near(imagined.returns, golden["cap/imag_ret"], 1e-5)
    assert_near(imagined.slow_value, golden["cap/imag_slowval"], 1e-5)
    bootstrap = imagined.returns[:, 0].unflatten(0, batch["reward"].shape[:2])
    assert_near(bootstrap, golden["cap/repl_boot"], 1e-5)
    slow_value = imagined.slow_value[:, 0].unflatten(0, bootstrap.shape)
    assert_near(slow_value, golden["cap/repl_slowval"], 1e-5)
    value = twohot_mean(loss.replay_critic.critic(rollout.feature), loss.replay_critic.bins)
    assert_near(value, golden["cap/repl_val"], 1e-5)
    replay = loss.replay_critic.terms(rollout.feature, batch, bootstrap, slow_value)
    assert_near(replay["value_replay"], golden["cap/outs_repval"], 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_imagined_states(name):
    golden, loss = Golden(name), make_loss(Golden(name))
    _, rollout = loss.model.terms(make_batch(golden))
    rssm, model = loss.model.world_model.rssm, loss.model.world_model
    start = (rollout.belief.flatten(0, 1), rollout.state.flatten(0, 1))
    imagined = rssm.imagine(loss.actor_critic.act, *start, golden.config["imag_length"])
    belief, state = imagined.feature.split([rssm.belief_size, rssm.state_size], -1)
    assert_near(belief[:, 1:], golden["cap/img_deter"], 1e-5)
    assert torch.equal(state[:, 1:], golden["cap/img_stoch"].flatten(-2))
    assert torch.equal(imagined.action, actions(golden, "cap/img_prevact"))
    bins = loss.actor_critic.bins
    assert_near(twohot_mean(model.reward_head(imagined.feature), bins), golden["cap/imag_rew"], 1e-5)
    assert_near(torch.sigmoid(model.continue_head(imagined.feature)).squeeze(-1), golden["cap/imag_con"], 1e-5)
    assert_near(twohot_mean(loss.actor_critic.critic(imagined.feature), bins), golden["cap/imag_val"], 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_training_step(name):
    golden = Golden(name)
    c, loss, names = golden.config, make_loss(golden), parameter_names(golden.config)
    losses = loss(make_batch(golden))
    metric = SimpleNamespace(**{k.replace("/", "_"): golden[f"metric/{k}"] for k in golden.names("metric")})
    scales = c["loss_scales"]
    for ours, reference in {
        "loss_model_reco": scales["rec"] * (metric.loss_image + metric.loss_vec),
        "loss_model_reward": scales["rew"] * metric.loss_rew,
        "loss_model_continue": scales["con"] * metric.loss_con,
        "loss_model_dynamic": scales["dyn"] * metric.loss_dyn,
        "loss_model_representation": scales["rep"] * metric.loss_rep,
        "loss_actor": scales["policy"] * metric.loss_policy,
        "loss_value": scales["value"] * metric.loss_value,
        "loss_value_replay": scales["repval"] * metric.loss_repval,
        ("wm", "prior_entropy"): metric.dyn_ent,
        ("wm", "posterior_entropy"): metric.rep_ent,
        ("ac", "entropy"): metric.ent_action,
        ("ac", "advantage_mean"): metric.adv,
        ("ac", "advantage_std"): metric.adv_std,
        ("ac", "advantage_magnitude"): metric.adv_mag,
        ("ac", "return_mean"): metric.tar,
        ("ac", "value_mean"): metric.val,
        ("ac", "slow_value_mean"): metric.slowval,
        ("ac", "reward_mean"): metric.rew,
        ("ac", "continuation_mean"): metric.con,
        ("ac", "weight_mean"): metric.weight,
    }.items():
        assert_near(losses[ours], reference, 1e-5, str(ours))
    total = sum(value for key, value in losses.items() if key.startswith("loss_"))
    assert_near(total, metric.opt_loss, 1e-5)
    context = losses["replay_context"]
    assert_near(context["belief"].float(), golden["replay_out/dyn/deter"], 2**-8)  # kept as bfloat16
    assert torch.equal(context["state"].long(), golden["replay_out/dyn/stoch"].argmax(-1))
    norm = loss.actor_critic.return_norm
    assert_near(norm.low.squeeze(), golden["after/retnorm/lo/value"], 1e-5)
    assert_near(norm.high.squeeze(), golden["after/retnorm/hi/value"], 1e-5)

    total.backward()
    trained = {ours: jax for ours, jax in names.items() if not jax.startswith("slowval/")}
    assert set(golden.names("grad")) == set(trained.values()), "every trained parameter has a reference gradient"
    assert_gradients(loss, golden, "grad", names, 1e-4)
    parameters = [p for p in loss.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == metric.opt_param_count.item()
    gradient_norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
    assert_near(gradient_norm, metric.opt_grad_norm, 1e-4)

    o = c["opt"]
    optimizer = DreamerV3Optimizer(
        parameters,
        lr=o["lr"],
        agc=o["agc"],
        beta1=o["beta1"],
        beta2=o["beta2"],
        eps=o["eps"],
        warmup_steps=o["warmup"],
    )
    optimizer.step()
    loss.update_targets()
    after, ours_of = dict(loss.named_parameters()), {jax: ours for ours, jax in names.items()}
    compared = [jax for jax in golden.names("after") if jax in ours_of]
    assert any(jax.startswith("slowval/") for jax in compared)
    for jax in compared:
        reference = ref.to_ours(golden[f"after/{jax}"])
        error = (after[ours_of[jax]].detach() - reference).abs()
        gradient = ref.to_ours(golden[f"grad/{jax.removeprefix('slow')}"]).abs()
        clear = gradient > 1e-6 * gradient.max()  # the first RMS step is the sign of the gradient
        assert (error[clear] <= 2e-3 * o["lr"]).all(), jax
