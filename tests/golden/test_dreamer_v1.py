"""Dreamer V1 against danijar/dreamer@56d4d44: networks and the pieces of the losses."""

import pytest
import torch
from torch import nn

from dreamer.models.conv_v1 import DECODER_KERNELS, KERNEL, MULTIPLIERS, ConvEncoder, DeconvDecoder
from dreamer.models.gaussian_rssm import GaussianRSSM
from dreamer.models.heads_v1 import Head, OneHotActor, TanhNormalActor, add_noise
from objectives.dreamer_v1 import clamped_mean, gaussian_entropy, gaussian_kl, gaussian_nll, imagined_returns
from objectives.functional import lambda_return
from tests.golden.reference import Golden, assert_near, load, prefixed
from tests.golden.reference_v1 import (
    DECODER_NAMES,
    ENCODER_NAMES,
    HALF_LOG_2PI,
    RSSM_NAMES,
    assert_each_near,
    assert_gradients,
    head_names,
    rearranged,
)


def make_rssm(golden: Golden) -> GaussianRSSM:
    c = golden.config
    rssm = GaussianRSSM(
        embed_size=c["embed"],
        action_size=c["actions"],
        belief_size=c["deter"],
        state_size=c["stoch"],
        hidden_size=c["hidden"],
        min_std=c["min_std"],
    )
    load(rssm, rearranged(golden, "param"), RSSM_NAMES)
    return rssm


class TestRSSM:
    def test_step(self):
        golden = Golden("v1_rssm")
        rssm = make_rssm(golden)
        names = ("prev_deter", "prev_stoch", "action", "embed")
        inputs = {name: golden[f"step/{name}"].requires_grad_() for name in names}
        belief, state, action, embed = inputs.values()
        rows = len(belief)
        rollout = rssm.observe(
            embed[:, None],
            action[:, None],
            torch.zeros(rows, 1, 1, dtype=torch.bool),
            belief,
            state,
            golden["step/eps_post"][:, None],
        )
        last = {name: part[:, 0] for name, part in rollout._asdict().items()}
        for ours, theirs in (
            ("belief", "post_deter"),
            ("belief", "prior_deter"),
            ("state", "post_stoch"),
            ("posterior_mean", "post_mean"),
            ("posterior_std", "post_std"),
            ("prior_mean", "prior_mean"),
            ("prior_std", "prior_std"),
        ):
            assert_near(last[ours], golden[f"step/{theirs}"], 5e-6, theirs)
        feature = rollout.feature[:, 0].roll(rssm.state_size, -1)
        assert_near(feature, golden["step/post_feat"], 5e-6)
        loss = (feature * golden["step/cot_feat"]).sum()
        loss = loss + (last["prior_mean"] * golden["step/cot_prior_mean"]).sum()
        (loss + (last["prior_std"] * golden["step/cot_prior_std"]).sum()).backward()
        for name, tensor in inputs.items():
            assert_near(tensor.grad, golden[f"step/grad_{name}"], 1e-5, name)
        assert_gradients(rssm, rearranged(golden, "step/grad"), RSSM_NAMES, 1e-5)

    def test_observe(self):
        golden = Golden("v1_rssm")
        rssm = make_rssm(golden)

        def observe():
            embed, action = (golden[f"observe/{name}"].requires_grad_() for name in ("embed", "action"))
            batch, steps = embed.shape[:2]
            never = torch.zeros(batch, steps, 1, dtype=torch.bool)
            start = rssm.initial(batch, embed.device)
            return embed, action, rssm.observe(embed, action, never, *start, golden["observe/eps_post"])

        embed, action, rollout = observe()
        for ours, theirs in (("prior", "prior"), ("posterior", "post")):
            for part in ("mean", "std"):
                assert_near(getattr(rollout, f"{ours}_{part}"), golden[f"observe/{theirs}_{part}"], 5e-6)
            std = getattr(rollout, f"{ours}_std")
            assert_near(gaussian_entropy(std), golden[f"observe/{theirs}_entropy"], 5e-6)
        assert_near(rollout.belief, golden["observe/post_deter"], 5e-6)
        assert_near(rollout.state, golden["observe/post_stoch"], 5e-6)
        kl = gaussian_kl(rollout.posterior_mean, rollout.posterior_std, rollout.prior_mean, rollout.prior_std)
        assert_near(kl, golden["observe/kl"], 5e-6)
        kl.mean().backward()
        assert_near(embed.grad, golden["observe/grad_kl_embed"], 1e-5)
        assert_near(action.grad, golden["observe/grad_kl_action"], 1e-5)
        assert_gradients(rssm, rearranged(golden, "observe/grad_kl"), RSSM_NAMES, 1e-5)

        rssm.zero_grad()
        embed, action, rollout = observe()
        belief, state = rollout.belief * golden["observe/cot_deter"], rollout.state * golden["observe/cot_stoch"]
        (belief.sum() + state.sum()).backward()
        assert_near(embed.grad, golden["observe/grad_state_embed"], 1e-5)
        assert_near(action.grad, golden["observe/grad_state_action"], 1e-5)
        assert_gradients(rssm, rearranged(golden, "observe/grad_state"), RSSM_NAMES, 1e-5)

    def test_imagine(self):
        golden = Golden("v1_rssm")
        rssm, action = make_rssm(golden), golden["imagine/action"]
        start = golden["observe/post_deter"][:, -1], golden["observe/post_stoch"][:, -1]
        imagined = rssm.imagine(lambda _, t: action[:, t], *start, action.shape[1], golden["imagine/eps"])
        belief, state = imagined.feature[:, 1:].split([rssm.belief_size, rssm.state_size], -1)
        mean, std = rssm.prior(belief)
        for ours, theirs in ((belief, "deter"), (state, "stoch"), (mean, "mean"), (std, "std")):
            assert_near(ours, golden[f"imagine/{theirs}"], 5e-6, theirs)

    def test_resets(self):
        """The file has the action chosen after an observation, we the one that led to it."""
        golden = Golden("v1_rssm")
        rssm, embed, reset = make_rssm(golden), golden["reset/embed"], golden["reset/reset"]
        action = golden["reset/action"].roll(1, 1)
        action[:, 0] = 0
        start = rssm.initial(len(embed), embed.device)
        rollout = rssm.observe(embed, action, reset.unsqueeze(-1), *start, golden["reset/eps_post"])
        for ours, theirs in (
            ("belief", "deter"),
            ("state", "stoch"),
            ("posterior_mean", "mean"),
            ("posterior_std", "std"),
        ):
            assert_near(getattr(rollout, ours), golden[f"reset/post_{theirs}"], 5e-6, theirs)


def test_encoder():
    golden = Golden("v1_encoder")
    c = golden.config
    assert (c["kernel"], c["stride"], c["padding"]) == (KERNEL, 2, "valid")
    encoder = ConvEncoder(image_shape=golden["image"].shape[1:], depth=c["depth"])
    load(encoder, golden.parameters(), ENCODER_NAMES)
    out = encoder(golden["image"])
    assert_near(out, golden["out"], 5e-6)
    assert encoder.out_features == out.shape[-1] == 4 * MULTIPLIERS[-1] * c["depth"]
    out.backward(golden["cot"])
    assert_gradients(encoder, golden.parameters("grad"), ENCODER_NAMES, 1e-5)


def test_decoder():
    golden = Golden("v1_decoder")
    feature, target = golden["feat"].requires_grad_(), golden["target"]
    assert tuple(golden.config["kernels"]) == DECODER_KERNELS
    decoder = DeconvDecoder(
        belief_size=7, state_size=4, image_shape=tuple(target.shape[1:]), depth=golden.config["depth"]
    )
    load(decoder, golden.parameters(), DECODER_NAMES)
    mean = decoder(*feature.split([7, 4], -1))
    assert_near(mean - 0.5, golden["mean"], 5e-6)
    nll = gaussian_nll(mean, target.float() / 255).flatten(1).sum(-1)
    assert_near(-nll, golden["neg_half_sse"], 5e-6)
    assert_near(-nll - HALF_LOG_2PI * target[0].numel(), golden["log_prob"], 5e-6)
    nll.mean().backward()
    assert_near(feature.grad, golden["grad_feat"], 1e-5)
    assert_gradients(decoder, golden.parameters("grad"), DECODER_NAMES, 1e-5)


@pytest.mark.parametrize("name", ["reward", "value", "pcont"])
def test_heads(name):
    golden = Golden("v1_heads")
    feature, layers = golden["feat"].requires_grad_(), golden.config["layers"][name]
    head, names = Head(feature.shape[-1], 1, units=golden.config["units"], layers=layers), head_names(name, layers)
    arrays = golden.parameters()
    load(head, {key: arrays[key] for key in names.values()}, names)
    out, target = head(feature).squeeze(-1), golden[f"{name}/target"]
    if name == "pcont":
        assert_near(out, golden["pcont/logits"], 5e-6)
        assert_near(torch.sigmoid(out), golden["pcont/mean"], 5e-6)
        log_prob = -nn.functional.binary_cross_entropy_with_logits(out, target, reduction="none")
    else:
        assert_near(out, golden[f"{name}/mode"], 5e-6)
        log_prob = -gaussian_nll(out, target) - HALF_LOG_2PI
    assert_near(log_prob, golden[f"{name}/log_prob"], 5e-6)
    assert_near(log_prob.mean(), golden[f"{name}/log_prob_mean"], 5e-6)
    log_prob.mean().backward()
    assert_near(feature.grad, golden[f"{name}/grad_feat"], 1e-5)
    grads = {f"{name}/{key}": grad for key, grad in golden.parameters(f"{name}/grad/{name}").items()}
    assert grads.keys() == set(names.values())
    assert_gradients(head, grads, names, 1e-5)


class TestTanhNormal:
    def make_actor(self, golden: Golden) -> TanhNormalActor:
        c = golden.config
        sizes = {"units": c["units"], "layers": c["layers"], "mean_scale": c["mean_scale"]}
        actor = TanhNormalActor(8, c["actions"], **sizes, init_std=c["init_std"], min_std=c["min_std"])
        load(actor, golden.parameters(), prefixed("head", head_names("actor", c["layers"])))
        return actor

    def test_distribution(self):
        golden = Golden("v1_actor")
        actor = self.make_actor(golden)
        assert actor.raw_init_std == pytest.approx(golden["raw_init_std"].item(), rel=1e-6)
        extreme = actor.distribution(golden["extreme_raw"])
        assert_near(extreme.mean, golden["extreme_mean"], 5e-6)
        assert_each_near(extreme.std, golden["extreme_std"], 1e-6)
        raw = golden["raw"].requires_grad_()
        policy = actor.distribution(raw)
        assert_near(policy.mean, golden["mean"], 5e-6)
        assert_near(policy.std, golden["std"], 5e-6)
        sample = policy.rsample(golden["eps"])
        assert_near(sample, golden["sample"], 5e-6)
        assert_each_near(policy.log_prob(golden["sample"]), golden["logp_of_sample"], 5e-6)
        (sample * golden["grad_sample_cot"]).sum().backward()
        assert_near(raw.grad, golden["grad_sample_raw"], 5e-6)

    def test_log_prob(self):
        golden = Golden("v1_actor")
        raw = golden["raw"].requires_grad_()
        log_prob = self.make_actor(golden).distribution(raw).log_prob(golden["eval_action"])
        assert_each_near(log_prob, golden["eval_logp"], 5e-6)
        (log_prob * golden["eval_weight"]).sum().backward()
        assert_each_near(raw.grad, golden["eval_grad_wlogp_raw"], 5e-5)

    def test_actor_and_its_samples(self):
        golden = Golden("v1_actor")
        policy = self.make_actor(golden)(golden["head/feat"])
        assert_near(policy.mean, golden["head/mean"], 5e-6)
        assert_near(policy.std, golden["head/std"], 5e-6)
        assert_near(policy.rsample(golden["head/eps"]), golden["head/action"], 5e-6)
        assert_near(policy.rsample(golden["samples/eps"]), golden["samples/action"], 5e-6)

    def test_what_a_hundred_samples_estimate(self):
        """From the samples of the reference: close to 1 the last bit decides which is the most likely."""
        golden = Golden("v1_actor")
        policy, actions = self.make_actor(golden)(golden["head/feat"]), golden["samples/action"]
        assert_near(actions.mean(0), golden["samples/mean"], 5e-6)
        log_prob = policy.log_prob(actions)  # [100, N]
        assert_each_near(log_prob, golden["samples/logp"], 5e-6)
        assert_near(-log_prob.mean(0), golden["samples/entropy"], 5e-6)
        assert torch.equal(log_prob.argmax(0), golden["samples/argmax"].long())
        mode, row_zero = policy.most_likely(actions), golden["samples/argmax"][0]
        assert torch.equal(mode, golden["samples/mode_row"])
        assert torch.equal(actions[row_zero], golden["samples/mode_batch"])  # the reference's, for several rows
        assert (mode != golden["samples/mode_batch"]).any()

    def test_exploration(self):
        golden = Golden("v1_actor")
        action = add_noise(golden["expl/action"], golden.config["expl_amount"], golden["expl/eps"])
        assert_near(action, golden["expl/out"], 5e-6)


def test_onehot_actor():
    golden = Golden("v1_actor_onehot")
    c, names = golden.config, prefixed("head", head_names("actor", golden.config["layers"]))
    actor = OneHotActor(golden["feat"].shape[-1], c["actions"], units=c["units"], layers=c["layers"])
    load(actor, golden.parameters(), names)
    one_hot = nn.functional.one_hot
    evaluated = one_hot(golden["eval_index"].long(), c["actions"]).float()
    drawn = one_hot(golden["index"].long(), c["actions"]).float()

    def gradients(of):
        feature = golden["feat"].requires_grad_()
        logits = actor.head(feature)
        logits.retain_grad()
        of(logits.log_softmax(-1)).backward()
        return feature.grad, logits.grad

    policy = actor(golden["feat"])
    assert_near(actor.head(golden["feat"]), golden["logits"], 5e-6)
    assert_near(policy.logits.exp(), golden["mean"], 5e-6)
    assert torch.equal(policy.mode, golden["mode"])
    assert_near(policy.rsample(drawn), golden["sample"], 5e-6)
    assert_near(policy.log_prob(evaluated), golden["eval_logp"], 5e-6)
    assert_near(policy.entropy(), golden["entropy"], 5e-6)
    make, weight = type(policy), golden["weight"]
    for name, of in {
        "sample": lambda logits: (make(logits).rsample(drawn) * golden["cot"]).sum(),
        "logp": lambda logits: (make(logits).log_prob(evaluated) * weight).sum(),
        "entropy": lambda logits: (make(logits).entropy() * weight).sum(),
    }.items():
        for grad, of_what in zip(gradients(of), ("feat", "logits"), strict=True):
            assert_near(grad, golden[f"grad_{name}_{of_what}"], 5e-6, name)


@pytest.mark.parametrize("case", ["high", "low"])
def test_kl(case):
    golden = Golden("v1_kl")
    names = ("post_mean", "post_std", "prior_mean", "prior_std")

    def gradients(reduce):
        inputs = [golden[f"{case}/{name}"].requires_grad_() for name in names]
        kl = gaussian_kl(*inputs)
        return kl.detach(), reduce(kl), torch.autograd.grad(reduce(kl), inputs)

    kl, div, grads = gradients(torch.mean)
    assert_near(kl, golden[f"{case}/kl"], 5e-6)
    assert_near(div, golden[f"{case}/div"], 5e-6)
    for grad, name in zip(grads, names, strict=True):
        assert_near(grad, golden[f"{case}/grad_div_{name}"], 5e-6, name)

    def clamped(kl):
        return clamped_mean(kl, golden.config["free_nats"])

    _, div, grads = gradients(clamped)
    assert_near(div, golden[f"{case}/div_clamped"], 5e-6)
    assert (div - golden[f"{case}/div_clamp_each"]).abs() > 1e-2, "the floor acts on the mean"
    for grad, name in zip(grads, names, strict=True):
        assert_near(grad, golden[f"{case}/grad_clamped_{name}"], 5e-6, name)


@pytest.mark.parametrize(("case", "lmbda"), [("const_l95", 0.95), ("var_l95", 0.95), ("var_l0", 0.0), ("var_l1", 1.0)])
def test_imagined_returns(case, lmbda):
    """The file is time-major."""
    golden = Golden("v1_lambda_return")
    inputs = {name: golden[name] for name in ("reward", "pcont", "value")}
    if case.startswith("const"):
        inputs["pcont"] = torch.full_like(inputs["pcont"], golden.config["discount"])
    for tensor in inputs.values():
        tensor.requires_grad_()
    returns, weight = imagined_returns(*(tensor.T for tensor in inputs.values()), lmbda)
    assert_near(returns.T, golden[f"{case}/ret"], 5e-6)
    assert_near(weight.T, golden[f"{case}/discount_weight"], 5e-6)
    assert not weight.requires_grad
    (returns.T * golden[f"{case}/cot"]).sum().backward()
    for name, tensor in inputs.items():
        assert_near(tensor.grad, golden[f"{case}/grad_{name}"], 5e-6, name)


def test_lambda_return_without_bootstrap():
    """Our lambda-return has rewards and discounts on arriving, the reference on leaving."""
    golden = Golden("v1_lambda_return")
    pad = nn.functional.pad
    reward, value = pad(golden["reward"].T, (1, 0)), pad(golden["value"].T, (0, 1))
    discount = torch.full_like(reward, golden.config["axis1_discount"])
    returns = lambda_return(reward, discount, value, golden.config["axis1_lambda"])
    assert_near(returns, golden["axis1_noboot/ret"], 5e-6)
