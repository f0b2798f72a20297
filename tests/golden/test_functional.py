"""The closed-form pieces against the reference: values and gradients."""

import pytest
import torch
from torch.nn import functional as F
from torchrl.modules import PercentileValueNorm
from torchrl.modules.functional import symexp, symlog

from dreamer.models.heads import BoundedNormal, ContinuousActor, OneHotCategorical
from dreamer.models.rssm import mix_uniform, sample_onehot
from objectives.functional import (
    actor_critic_terms,
    categorical_entropy,
    categorical_kl,
    kl_terms,
    lambda_return,
    replay_critic_terms,
    symexp_bins,
    twohot_mean,
    twohot_nll,
)
from tests.golden.reference import Golden, actor_names, assert_near, load


def test_symlog():
    golden = Golden("symlog")
    torch.testing.assert_close(symlog(golden["symlog_in"]), golden["symlog_out"], rtol=1e-6, atol=0)
    torch.testing.assert_close(symexp(golden["symexp_in"]), golden["symexp_out"], rtol=1e-6, atol=0)
    torch.testing.assert_close(symexp(symlog(golden["roundtrip_in"])), golden["roundtrip_out"], rtol=3e-6, atol=0)


def test_symexp_twohot():
    golden = Golden("symexp_twohot")
    torch.testing.assert_close(symexp_bins(golden.config["bins"]), golden["bins"], rtol=5e-6, atol=0)
    # with their bins, because a target on one of them turns 1e-6 of the bin into 6e-6 of a weight
    bins, logits = golden["bins"], golden["logits"].requires_grad_()
    # 1e-6 is documented, but the reference's own float32 sum is 1.4e-6 away from the exact one in row 70
    allowed = 2e-6 * (torch.softmax(logits, -1) * bins.abs()).sum(-1)
    assert ((twohot_mean(logits, bins) - golden["pred"]).abs() <= allowed).all()
    exact = (torch.softmax(logits.double(), -1) * bins.double()).sum(-1)
    assert ((twohot_mean(logits, bins) - exact).abs() <= 0.25 * allowed).all()
    loss = twohot_nll(logits, golden["target"], bins)
    assert_near(loss, golden["loss"], 5e-6)
    loss.sum().backward()
    assert_near(logits.grad, golden["grad_loss_logits"], 5e-6)
    zeros = torch.zeros_like(logits).requires_grad_()
    twohot_nll(zeros, golden["target"], bins).sum().backward()
    assert_near(torch.softmax(zeros, -1) - zeros.grad, golden["target_weights"], 5e-6)
    assert torch.equal(twohot_mean(golden["uniform_logits"], bins), golden["uniform_pred"])
    uniform = torch.zeros(len(golden["uniform_target"]), len(bins))
    assert_near(twohot_nll(uniform, golden["uniform_target"], bins), golden["uniform_loss"], 5e-6)


def test_symexp_twohot_with_even_bins():
    golden = Golden("symexp_twohot")
    bins, logits = symexp_bins(golden.config["even_bins"]), golden["even_logits"]
    torch.testing.assert_close(bins, golden["even_bins"], rtol=5e-6, atol=0)
    allowed = 1e-6 * (torch.softmax(logits, -1) * bins.abs()).sum(-1)
    assert ((twohot_mean(logits, bins) - golden["even_pred"]).abs() <= allowed).all()
    assert_near(twohot_nll(logits, golden["even_target"], bins), golden["even_loss"], 5e-6)
    assert torch.equal(twohot_mean(torch.zeros(2, len(bins)), bins), golden["even_uniform_pred"])


def test_categorical_unimix_kl():
    golden, unimix = Golden("categorical_unimix_kl"), Golden("categorical_unimix_kl").config["unimix"]
    raw_prior, raw_post = golden["prior_logits"].requires_grad_(), golden["post_logits"].requires_grad_()
    prior, post = mix_uniform(raw_prior, unimix).log(), mix_uniform(raw_post, unimix).log()
    assert_near(prior.exp(), golden["prior_probs"], 5e-6)
    assert_near(post.exp(), golden["post_probs"], 5e-6)
    assert_near(categorical_entropy(prior), golden["prior_entropy"], 5e-6)
    assert_near(categorical_entropy(post), golden["post_entropy"], 5e-6)
    assert_near(categorical_entropy(prior).mean(), golden["dyn_ent_metric"], 5e-6)
    assert_near(categorical_entropy(post).mean(), golden["rep_ent_metric"], 5e-6)
    assert_near(categorical_kl(post, prior), golden["kl_post_prior"], 5e-6)
    dynamic, representation = kl_terms(post, prior, golden.config["free_nats"])
    for name, term in (("dyn", dynamic), ("rep", representation)):
        assert_near(term, golden[name], 5e-6)
        assert_near(term.mean(), golden[f"{name}_mean"], 5e-6)
        grads = torch.autograd.grad(term.mean(), [raw_prior, raw_post], retain_graph=True, allow_unused=True)
        for grad, side in zip(grads, ("prior", "post"), strict=True):
            reference = golden[f"grad_{name}_{side}"]
            if reference.any():
                assert_near(grad, reference, 1e-5, f"{name} {side}")
            else:
                assert grad is None or not grad.any(), f"{name} must not train the {side}"


def test_straight_through_sample():
    golden = Golden("categorical_unimix_kl")
    raw = golden["post_logits"].requires_grad_()
    index = golden["st_index"].long()
    probs = mix_uniform(raw, golden.config["unimix"])
    sample = sample_onehot(probs, F.one_hot(index, raw.shape[-1]).float()).unflatten(-1, raw.shape[-2:])
    assert torch.equal(sample, golden["st_onehot"])
    (sample * golden["st_cotangent"]).sum().backward()
    assert_near(raw.grad, golden["st_grad_logits"], 1e-5)
    log_prob = probs.log().gather(-1, index.unsqueeze(-1)).squeeze(-1).sum(-1)
    assert_near(log_prob, golden["post_logp_of_index"], 5e-6)


def test_binary():
    golden = Golden("binary")
    logit = golden["logit"].requires_grad_()
    alive = (~golden["is_terminal"].bool()).float()
    target = alive * (1 - 1 / golden.config["horizon"])
    assert_near(target, golden["target"], 5e-6)
    loss = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    assert_near(loss, golden["loss"], 5e-6)
    loss.mean().backward()
    assert_near(logit.grad, golden["grad_loss_mean_logit"], 5e-6)
    assert_near(torch.sigmoid(logit), golden["prob1"], 5e-6)
    undiscounted = F.binary_cross_entropy_with_logits(logit, alive, reduction="none")
    assert_near(undiscounted, golden["loss_undiscounted_target"], 5e-6)


def bounded_normal(raw_mean, raw_std, minstd, maxstd) -> BoundedNormal:
    """The head's own transformation of raw outputs, reached through a head with identity layers."""
    size = raw_mean.shape[-1]
    actor = ContinuousActor(2 * size, size, units=2 * size, layers=0, min_std=minstd, max_std=maxstd)
    with torch.no_grad():
        eye = torch.eye(2 * size)
        actor.mean.weight.copy_(eye[:size])
        actor.std.weight.copy_(eye[size:])
    return actor(torch.cat([raw_mean, raw_std], -1))


def test_bounded_normal():
    golden = Golden("bounded_normal")
    raw_mean, raw_std = golden["raw_mean"].requires_grad_(), golden["raw_std"].requires_grad_()
    policy = bounded_normal(raw_mean, raw_std, **golden.config)
    assert_near(policy.mean, golden["mean"], 5e-6)
    assert_near(policy.std, golden["std"], 5e-6)
    assert_near(policy.mode, golden["pred"], 5e-6)
    log_prob, entropy = policy.log_prob(golden["action"]), policy.entropy()
    assert_near(log_prob, golden["logp"], 5e-6)
    assert_near(entropy, golden["entropy"], 5e-6)
    for value, name in ((log_prob, "logp"), (entropy, "entropy")):
        grads = torch.autograd.grad(
            (golden["weight"] * value).sum(), [raw_mean, raw_std], retain_graph=True, allow_unused=True
        )
        for grad, part in zip(grads, ("raw_mean", "raw_std"), strict=True):
            reference = golden[f"grad_w{name}_{part}"]
            if reference.any():
                assert_near(grad, reference, 1e-5, f"{name} {part}")
            else:
                assert grad is None or not grad.any()
    actor = ContinuousActor(
        golden["head_x"].shape[-1],
        golden["mean"].shape[-1],
        units=golden["head_x"].shape[-1],
        layers=0,
        min_std=golden.config["minstd"],
        max_std=golden.config["maxstd"],
    )
    names = {ours: jax.removeprefix("pol/head/action/") for ours, jax in actor_names("pol", 0, discrete=False).items()}
    load(
        actor,
        {
            name.removeprefix("head/"): golden[name if name in golden.arrays else f"param/{name}"]
            for name in ("head/mean/kernel", "head/mean/bias", "head/stddev/kernel", "head/stddev/bias")
        },
        names,
    )
    assert_near(actor(golden["head_x"]).mean, golden["head_mean"], 5e-6)
    assert_near(actor(golden["head_x"]).std, golden["head_std"], 5e-6)


@pytest.mark.parametrize("suffix", ["", "_unimix"])
def test_categorical_actor(suffix):
    golden = Golden("categorical_actor")
    raw = golden["logits"].requires_grad_()
    unimix = golden.config["unimix_in_config"]
    policy = OneHotCategorical(mix_uniform(raw, unimix).log() if suffix else torch.log_softmax(raw, -1))
    action = F.one_hot(golden["action"].long(), golden.config["actions"]).float()
    log_prob, entropy = policy.log_prob(action), policy.entropy()
    stem = "unimix_" if suffix else ""
    assert_near(log_prob, golden[f"{stem}logp"], 5e-6)
    assert_near(entropy, golden[f"{stem}entropy"], 5e-6)
    assert torch.equal(policy.mode.argmax(-1), golden["pred"].long())
    for value, name in ((log_prob, "logp"), (entropy, "entropy")):
        grad = torch.autograd.grad((golden["weight"] * value).sum(), raw, retain_graph=True)[0]
        assert_near(grad, golden[f"grad_w{name}_logits{suffix}"], 1e-5)


def test_lambda_return():
    golden = Golden("lambda_return")
    c = golden.config
    continuation = (1 - golden["imag_term"]) * c["imag_disc"]
    assert_near(
        lambda_return(golden["imag_rew"], continuation, golden["imag_value"], c["lam"]), golden["imag_ret"], 5e-6
    )
    last, alive = golden["repl_last"].bool(), (~golden["repl_term"].bool()).float()
    for name, discount, lmbda in (("repl_ret", c["repl_disc"], c["lam"]), ("gen_ret", c["gen_disc"], c["gen_lam"])):
        returns = lambda_return(golden["repl_rew"], alive * discount, golden["repl_boot"], lmbda, last)
        assert_near(returns, golden[name], 5e-6)


def return_norm(rate: float, limit: float = 1.0, low: float = 0.0, high: float = 0.0) -> PercentileValueNorm:
    norm = PercentileValueNorm(rate=rate, min_scale=limit)
    norm.low.fill_(low)
    norm.high.fill_(high)
    return norm


@pytest.mark.parametrize("variant", Golden("imag_loss").config["variants"])
def test_imag_loss(variant):
    golden = Golden("imag_loss")
    v, g = golden.config["variants"][variant], lambda name: golden[f"{variant}{name}"]
    kind = variant.split("_")[0]
    bins = symexp_bins(golden.config["bins"])
    raw = golden[f"{kind}/policy_raw"].requires_grad_()
    value_logits = golden[f"{kind}/value_logits"].requires_grad_()
    action = golden[f"{kind}/action"]
    if kind == "cont":
        bounds = {k: golden.config[k] for k in ("minstd", "maxstd")}
        policy = bounded_normal(*raw[:, :-1].chunk(2, -1), **bounds)
    else:
        policy = OneHotCategorical(torch.log_softmax(raw[:, :-1], -1))
        action = F.one_hot(action.long(), raw.shape[-1]).float()
    slow_value = twohot_mean(golden[f"{kind}/slow_value_logits"], bins)
    assert_near(slow_value, golden[f"{kind}/slow_value_pred"], 5e-6)
    norm = return_norm(
        golden.config["retnorm"]["rate"],
        golden.config["retnorm"]["limit"],
        g("retnorm_lo_before").item(),
        g("retnorm_hi_before").item(),
    )
    terms = actor_critic_terms(
        log_prob=policy.log_prob(action[:, :-1]),
        entropy=policy.entropy(),
        reward=golden[f"{kind}/rew"],
        continuation=golden[f"{kind}/con"],
        value_logits=value_logits,
        slow_value=slow_value,
        bins=bins,
        return_norm=norm,
        lmbda=v["lam"],
        entropy_scale=v["actent"],
        slow_regularizer=v["slowreg"],
        slow_target=v["slowtar"],
        discount=1.0 if v["contdisc"] else 1 - 1 / v["horizon"],
    )
    assert_near(terms.actor, g("policy_loss"), 5e-6)
    assert_near(terms.value, g("value_loss"), 5e-6)
    assert_near(terms.returns, g("ret"), 5e-6)
    assert_near(terms.actor.mean(), g("policy_loss_mean"), 5e-6)
    assert_near(terms.value.mean(), g("value_loss_mean"), 5e-6)
    assert_near(norm.low.squeeze(), g("retnorm_lo_after"), 5e-6)
    assert_near(norm.high.squeeze(), g("retnorm_hi_after"), 5e-6)
    assert_near(norm.scale().squeeze(), g("retnorm_scale"), 5e-6)
    assert_near(terms.advantage.mean(), g("metric/adv"), 5e-6)
    assert_near(terms.advantage.std(correction=0), g("metric/adv_std"), 5e-6)
    assert_near(terms.advantage.abs().mean(), g("metric/adv_mag"), 5e-6)
    assert_near(terms.weight.mean(), g("metric/weight"), 5e-6)
    grad = torch.autograd.grad(terms.actor.mean(), [raw, value_logits], retain_graph=True, allow_unused=True)
    assert_near(grad[0], g("grad_policy_mean_raw"), 2e-5)
    assert grad[1] is None
    grad = torch.autograd.grad(terms.value.mean(), [raw, value_logits], allow_unused=True)
    assert grad[0] is None
    if f"{variant}grad_value_mean_logits" in golden.arrays:
        assert_near(grad[1], g("grad_value_mean_logits"), 2e-5)


def test_repl_loss():
    golden = Golden("repl_loss")
    c, bins = golden.config, symexp_bins(golden.config["bins"])
    assert not c["slowtar"]
    logits = golden["value_logits"].requires_grad_()
    slow_value = twohot_mean(golden["slow_value_logits"], bins)
    assert_near(slow_value, golden["slow_value_pred"], 5e-6)
    loss = replay_critic_terms(
        reward=golden["rew"],
        terminated=golden["term"].bool(),
        last=golden["last"].bool(),
        bootstrap=golden["boot"],
        value_logits=logits,
        slow_value=slow_value,
        bins=bins,
        lmbda=c["lam"],
        slow_regularizer=c["slowreg"],
        discount=1 - 1 / c["horizon"],
    )
    assert_near(loss, golden["repval_loss"], 5e-6)
    assert_near(loss.mean(), golden["repval_loss_mean"], 5e-6)
    loss.mean().backward()
    assert_near(logits.grad, golden["grad_mean_value_logits"], 3e-5)


@pytest.mark.parametrize("case", ["retnorm", "perc_fast"])
def test_return_normaliser(case):
    """The two percentile cases without debias; nothing here uses the others in the file."""
    golden = Golden("slow_target")
    c = golden.config["norms"][case]
    norm = return_norm(c["rate"], c["limit"])
    rows = zip(golden["norm_input"], golden[f"{case}/offset_scale_before_after"], golden[f"{case}/state"], strict=True)
    for batch, (low0, scale0, low1, scale1), (high, low) in rows:
        torch.testing.assert_close(
            torch.cat([norm.low, norm.scale()]), torch.stack([low0, scale0]), rtol=5e-6, atol=5e-6
        )
        norm.update(batch.unsqueeze(-1))
        torch.testing.assert_close(
            torch.cat([norm.low, norm.scale()]), torch.stack([low1, scale1]), rtol=5e-6, atol=5e-6
        )
        torch.testing.assert_close(torch.cat([norm.high, norm.low]), torch.stack([high, low]), rtol=5e-6, atol=5e-6)


def test_slow_critic():
    """slow <- 0.98 slow + 0.02 critic after each update, starting as a copy."""
    from objectives.actor_critic import ImaginedActorCriticLoss

    golden = Golden("slow_target")
    c = golden.config["slow"]["default"]
    assert c["every"] == 1

    def put(layer, step):
        with torch.no_grad():
            layer.weight.copy_(golden["slow/src/kernel"][step].T)
            layer.bias.copy_(golden["slow/src/bias"][step])

    critic = torch.nn.Linear(*golden["slow/src/kernel"].shape[1:])
    put(critic, 0)
    loss = ImaginedActorCriticLoss(torch.nn.Module(), torch.nn.Module(), critic, slow_critic_rate=c["rate"])
    for step in range(len(golden["slow_default/dst/bias"])):
        put(critic, step + 1)
        loss.update_slow_critic()
        assert_near(loss.slow_critic.weight.T, golden["slow_default/dst/kernel"][step], 5e-6)
        assert_near(loss.slow_critic.bias, golden["slow_default/dst/bias"][step], 5e-6)
