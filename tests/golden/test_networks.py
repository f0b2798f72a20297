"""Networks against the reference: values and gradients with the reference's own parameters."""

import json

import pytest
import torch

from dreamer.agents.parts import make_actor, make_critic, make_world_model
from dreamer.models.conv import KERNEL, ImageDecoder, ImageEncoder
from dreamer.models.heads import ContinuousActor, DiscreteActor, Head
from dreamer.models.layers import NORM_EPS, BlockLinear, Linear, RMSNorm, init_truncated_normal_
from dreamer.models.rssm import RSSM
from dreamer.models.world_model import VectorDecoder, VectorEncoder
from objectives.functional import categorical_entropy, kl_terms, twohot_mean
from tests.golden import reference as ref
from tests.golden.reference import GOLDEN_DIR, Golden, assert_gradients, assert_near, load


def make_rssm(golden: Golden, embed_size: int, action_size: int) -> RSSM:
    c = golden.config
    assert c["dynlayers"] == 1 and c["rms_eps"] == NORM_EPS
    rssm = RSSM(
        embed_size=embed_size,
        action_size=action_size,
        belief_size=c["deter"],
        hidden_size=c["hidden"],
        classes=c["classes"],
        categoricals=c["stoch"],
        blocks=c["blocks"],
        prior_layers=c["imglayers"],
        posterior_layers=c["obslayers"],
        unimix=c["unimix"],
    )
    return rssm


def load_known(module, golden: Golden, names: dict[str, str]) -> None:
    """Load the parameters that the file has; the test then uses no others."""
    arrays = golden.parameters()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for ours, jax in names.items():
            if jax in arrays:
                parameters[ours].copy_(ref.to_ours(arrays[jax]))


def log_probs(raw: torch.Tensor, unimix: float) -> torch.Tensor:
    return (torch.softmax(raw, -1) * (1 - unimix) + unimix / raw.shape[-1]).log()


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_rmsnorm(case):
    golden = Golden("rmsnorm")
    x = golden[f"{case}/x"].requires_grad_()
    layer = RMSNorm(x.shape[-1])
    with torch.no_grad():
        layer.scale.copy_(golden[f"{case}/scale"])
    y = layer(x)
    y.backward(golden[f"{case}/cotangent"])
    for ours, name in ((y, "y"), (x.grad, "grad_x")):
        theirs = golden[f"{case}/{name}"].double().flatten(0, -2)
        error = (ours.detach().double().flatten(0, -2) - theirs).abs().amax(-1)
        assert (error <= 2e-6 * theirs.abs().amax(-1)).all(), name
    assert_near(layer.scale.grad, golden[f"{case}/grad_scale"], 5e-6)


def test_init_stats():
    golden = Golden("init_stats")
    layers = {
        "linear": lambda i, o: Linear(i, o),
        "linear_out_0.01": lambda i, o: Linear(i, o, outscale=0.01),
        "linear_out_0.0": lambda i, o: Linear(i, o, outscale=0.0),
    }
    torch.manual_seed(0)
    for name in layers.keys() | {"blocklinear", "conv5"}:
        shape = golden[f"{name}/kernel_shape"].tolist()
        expected = golden[f"{name}/expected_std"].item()
        if name == "blocklinear":
            weight = BlockLinear(shape[0] * shape[1], shape[0] * shape[2], shape[0]).weight
        elif name == "conv5":
            weight = init_truncated_normal_(torch.empty(shape[3], shape[2], *shape[:2]), shape[0] * shape[1] * shape[2])
        else:
            weight = layers[name](*shape).weight
        assert weight.abs().max() <= 2.2736 * expected * (1 + 1e-6)
        spread = golden[f"{name}/mean_std_min_max"][:, 1]  # of ten seeds of the reference
        assert abs(weight.std().item() - expected) <= max(0.02 * expected, 3 * spread.std().item()), name


def test_block_gru_core():
    golden = Golden("block_gru_core")
    action = golden["action"].requires_grad_()
    rssm = make_rssm(golden, embed_size=4, action_size=action.shape[-1])
    names = ref.rssm_names()
    load_known(rssm, golden, names)
    deter = golden["deter"].requires_grad_()
    stoch = golden["stoch"].requires_grad_()

    def step(belief):
        return rssm.core(1, len(belief))(belief, stoch.flatten(-2), rssm.action_branch(action))

    new = step(deter)
    assert_near(new, golden["new_deter"], 5e-6)
    new.backward(golden["cotangent"])
    for tensor, name in ((deter, "grad_deter"), (stoch, "grad_stoch"), (action, "grad_action")):
        assert_near(tensor.grad, golden[name], 1e-5, name)
    assert_gradients(rssm, golden, "grad", names, 1e-5)
    belief = deter
    for reference in golden["chained_deter"]:
        belief = step(belief)
        assert_near(belief, reference, 5e-6)


def test_rssm_heads():
    golden = Golden("rssm_heads")
    rssm = make_rssm(golden, embed_size=golden["tokens"].shape[-1], action_size=2)
    load_known(rssm, golden, ref.rssm_names(golden.config["imglayers"]))
    unimix = golden.config["unimix"]
    assert_near(rssm.prior_logits(golden["deter"]), log_probs(golden["prior_logits"], unimix), 5e-6)
    posterior = rssm.posterior_logits(golden["deter"], golden["tokens"])
    assert_near(posterior, log_probs(golden["post_logits"], unimix), 5e-6)


def observed(golden: Golden, rssm: RSSM, tokens: torch.Tensor):
    action = golden["prevaction"]
    if golden.config["action_kind"] == "disc":
        action = torch.nn.functional.one_hot(action.long(), golden.config["actions"])
    noise = torch.nn.functional.one_hot(golden["stoch_index"].long(), golden.config["classes"]).float()
    state = golden["init_stoch"].flatten(-2)
    is_init = golden["is_first"].unsqueeze(-1).bool()
    return rssm.observe(tokens, action.float(), is_init, golden["init_deter"], state, noise)


@pytest.mark.parametrize("name", ["rssm_observe_cont", "rssm_observe_disc"])
def test_rssm_observe(name):
    golden = Golden(name)
    tokens = golden["tokens"].requires_grad_()
    rssm = make_rssm(golden, tokens.shape[-1], golden.config["actions"])
    names = ref.rssm_names(golden.config["imglayers"])
    load(rssm, golden.parameters(), names)
    rollout, unimix = observed(golden, rssm, tokens), golden.config["unimix"]
    assert_near(rollout.belief, golden["deter"], 5e-6)
    assert torch.equal(rollout.state, golden["stoch"].flatten(-2))
    assert_near(rollout.belief[:, -1], golden["final_deter"], 5e-6)
    assert torch.equal(rollout.state[:, -1], golden["final_stoch"].flatten(-2))
    assert_near(rollout.posterior_logits, log_probs(golden["post_logits"], unimix), 5e-6)
    assert_near(rollout.prior_logits, log_probs(golden["prior_logits"], unimix), 5e-6)
    dynamic, representation = kl_terms(rollout.posterior_logits, rollout.prior_logits, golden.config["free_nats"])
    assert_near(dynamic, golden["dyn_loss"], 5e-6)
    assert_near(representation, golden["rep_loss"], 5e-6)
    assert_near(categorical_entropy(rollout.prior_logits).mean(), golden["dyn_ent"], 5e-6)
    assert_near(categorical_entropy(rollout.posterior_logits).mean(), golden["rep_ent"], 5e-6)

    (dynamic.mean() + 0.1 * representation.mean()).backward()
    assert_near(tokens.grad, golden["grad_kl_tokens"], 1e-5)
    if golden.names("grad_kl"):
        assert_gradients(rssm, golden, "grad_kl", names, 1e-5)

    rssm.zero_grad()
    tokens.grad = None
    rollout = observed(golden, rssm, tokens)
    state = rollout.state.unflatten(-1, golden["cot_stoch"].shape[-2:])
    ((rollout.belief * golden["cot_deter"]).mean() + (state * golden["cot_stoch"]).mean()).backward()
    assert_near(tokens.grad, golden["grad_st_tokens"], 1e-5)
    if golden.names("grad_st"):
        assert_gradients(rssm, golden, "grad_st", names, 1e-5)


@pytest.mark.parametrize("name", ["rssm_observe_cont", "rssm_observe_disc"])
def test_rssm_imagine(name):
    golden = Golden(name)
    rssm = make_rssm(golden, golden["tokens"].shape[-1], golden.config["actions"])
    load(rssm, golden.parameters(), ref.rssm_names(golden.config["imglayers"]))
    action = golden["imag_action"]
    if golden.config["action_kind"] == "disc":
        action = torch.nn.functional.one_hot(action.long(), golden.config["actions"]).float()
    noise = torch.nn.functional.one_hot(golden["imag_stoch_index"].long(), golden.config["classes"]).float()
    horizon = action.shape[1]
    imagined = rssm.imagine(
        lambda feature, step: action[:, step], golden["init_deter"], golden["init_stoch"].flatten(-2), horizon, noise
    )
    belief, state = imagined.feature.split([rssm.belief_size, rssm.state_size], -1)
    assert_near(belief[:, 1:], golden["imag_deter"], 5e-6)
    assert torch.equal(state[:, 1:], golden["imag_stoch"].flatten(-2))
    assert torch.equal(imagined.action, action)
    prior = rssm.prior_logits(belief[:, 1:])
    assert_near(prior, log_probs(golden["imag_logits"], golden.config["unimix"]), 5e-6)


def image_arguments(golden: Golden) -> dict:
    c = golden.config
    assert c["kernel"] == KERNEL and not c["strided"] and not c["outer"]
    return {"image_shape": tuple(c["image"]), "depth": c["depth"], "multipliers": tuple(c["mults"])}


def test_encoder():
    golden = Golden("encoder")
    encoder = ImageEncoder(**image_arguments(golden))
    names = ref.image_encoder_names(len(golden.config["mults"]))
    load(encoder, golden.parameters(), names)
    tokens = encoder(golden["image"])
    assert_near(tokens, golden["tokens"], 5e-6)
    (tokens * golden["cotangent"]).mean().backward()
    assert_gradients(encoder, golden, "grad", names, 5e-5)


def test_decoder():
    golden = Golden("decoder")
    belief, stoch = golden["deter"].requires_grad_(), golden["stoch"].requires_grad_()
    decoder = ImageDecoder(
        belief_size=belief.shape[-1],
        state_size=stoch.shape[-2] * stoch.shape[-1],
        units=golden.config["units"],
        blocks=golden.config["bspace"],
        **image_arguments(golden),
    )
    names = ref.image_decoder_names(len(golden.config["mults"]))
    load(decoder, golden.parameters(), names)
    prediction = decoder(belief, stoch.flatten(-2))
    assert_near(prediction, golden["pred"], 5e-6)
    loss = (prediction - golden["image"].float() / 255).square().sum((-3, -2, -1))
    assert_near(loss, golden["loss"], 5e-6)
    loss.mean().backward()
    assert_near(loss.mean(), golden["loss_mean"], 5e-6)
    assert_near(belief.grad, golden["grad_deter"], 5e-5)
    assert_near(stoch.grad, golden["grad_stoch"], 5e-5)
    assert_gradients(decoder, golden, "grad", names, 5e-5)


def sorted_vectors(golden: Golden, prefix: str) -> torch.Tensor:
    """All vector observations side by side, sorted by name; scalars become width 1."""
    vectors = [golden[f"{prefix}/{key}"] for key in golden.config["order"]]
    return torch.cat([v.unsqueeze(-1) if v.ndim == 2 else v for v in vectors], -1)


def test_encoder_vec():
    golden = Golden("encoder_vec")
    observation, layers = sorted_vectors(golden, "obs"), golden.config["layers"]
    encoder = VectorEncoder(observation.shape[-1], units=golden.config["units"], layers=layers)
    load(encoder, golden.parameters(), ref.vector_encoder_names(layers))
    assert_near(encoder(observation), golden["tokens"], 5e-6)


def test_decoder_vec():
    from objectives.world_model import squared_error

    golden = Golden("decoder_vec")
    observation, state = sorted_vectors(golden, "obs"), golden["stoch"].flatten(-2)
    c, arrays = golden.config, golden.parameters()
    for part in ("kernel", "bias"):  # one head per key there, one for all keys side by side here
        heads = [arrays.pop(f"dec/vec/{key}/pred/{part}") for key in c["order"]]
        arrays[f"dec/vec/all/pred/{part}"] = torch.cat(heads, -1)
    decoder = VectorDecoder(
        golden["deter"].shape[-1], state.shape[-1], observation.shape[-1], units=c["units"], layers=c["layers"]
    )
    load(decoder, arrays, ref.vector_decoder_names(c["layers"], "all"))
    prediction = decoder(golden["deter"], state)
    assert_near(prediction, sorted_vectors(golden, "pred"), 5e-6)
    loss = sum(golden[f"loss/{key}"] for key in c["order"])
    assert_near(squared_error(prediction, observation), loss, 5e-6)


def test_mlp_heads():
    golden = Golden("mlp_heads")
    c, feature, arrays = golden.config, golden["feat"], golden.parameters()
    bins = torch.tensor(Golden("symexp_twohot").arrays["bins"])
    in_features, units = feature.shape[-1], c["units"]
    for name in ("rew", "val"):
        head = Head(in_features, c[name]["bins"], units=units, layers=c[name]["layers"], outscale=c[name]["outscale"])
        assert not head[1].weight.any() and golden[f"init_std/{name}/head/logits/kernel"] == 0
        load(
            head,
            {k: v for k, v in arrays.items() if k.startswith(name)},
            ref.head_names(name, c[name]["layers"], "logits"),
        )
        assert_near(head(feature), golden[f"out/{name}/logits"], 5e-6)
        allowed = 1e-6 * (torch.softmax(head(feature), -1) * bins.abs()).sum(-1)
        assert ((twohot_mean(head(feature), bins) - golden[f"out/{name}/pred"]).abs() <= allowed).all()
    head = Head(in_features, 1, units=units, layers=c["con"]["layers"])
    load(head, arrays, ref.head_names("con", c["con"]["layers"], "logit"))
    assert_near(head(feature).squeeze(-1), golden["out/con/logit"], 5e-6)
    assert_near(torch.sigmoid(head(feature)).squeeze(-1), golden["out/con/prob1"], 5e-6)
    action_size = golden["out/pol/mean"].shape[-1]
    bounds = {"min_std": c["pol"]["minstd"], "max_std": c["pol"]["maxstd"]}
    actor = ContinuousActor(in_features, action_size, units=units, layers=c["pol"]["layers"], **bounds)
    load(actor, arrays, ref.actor_names("pol", c["pol"]["layers"], discrete=False))
    assert_near(actor(feature).mean, golden["out/pol/mean"], 5e-6)
    assert_near(actor(feature).std, golden["out/pol/std"], 5e-6)
    actor = DiscreteActor(in_features, golden["out/pold/logits"].shape[-1], units=units, layers=c["pold"]["layers"])
    load(actor, arrays, ref.actor_names("pold", c["pold"]["layers"], discrete=True))
    assert_near(actor(feature).logits, torch.log_softmax(golden["out/pold/logits"], -1), 5e-6)


def test_output_layers_start_small():
    golden = Golden("mlp_heads")
    torch.manual_seed(0)
    for name, kernel in (("pol", "mean"), ("pol", "stddev"), ("pold", "logits"), ("con", None)):
        outscale = golden.config[name]["outscale"]
        key = f"{name}/head/logit/kernel" if kernel is None else f"{name}/head/action/{kernel}/kernel"
        fan_in = golden[f"init_fan_in/{key}"].item()
        weight = Linear(int(fan_in), 4096, outscale).weight
        assert abs(weight.std().item() / (outscale / fan_in**0.5) - 1) < 0.02


VISION = [f"dmc_vision+size{size}" for size in ("1m", "12m", "25m", "50m", "100m", "200m", "400m")]


@pytest.mark.parametrize("case", [*VISION, "dmc_proprio+size1m", "dmc_proprio+size12m", "atari100k+size12m"])
def test_parameter_counts(case):
    """Exactly the reference's number of parameters, module by module."""
    entry = json.loads((GOLDEN_DIR / "param_shapes.json").read_text())[case]
    rssm = entry["rssm"]
    observations = {"observation": (24,)} if "proprio" in case else {"pixels": (64, 64, 3)}
    discrete, units = "int" in entry["action"], entry["units"]
    with torch.device("meta"):
        model = make_world_model(
            observations=observations,
            action_size=6,
            belief_size=rssm["deter"],
            hidden_size=rssm["hidden"],
            classes=rssm["classes"],
            categoricals=rssm["stoch"],
            depth=entry["depth"],
            units=units,
        )
        feature_size = model.rssm.belief_size + model.rssm.state_size
        actor = make_actor(feature_size, 6, units=units, discrete=discrete)
        critic = make_critic(feature_size, units=units)
    modules = {
        "enc": model.encoders,
        "dec": model.decoders,
        "dyn": model.rssm,
        "rew": model.reward_head,
        "con": model.continue_head,
        "pol": actor,
        "val": critic,
    }
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    assert counts == entry["by_module"]
    assert sum(counts.values()) == entry["total"]
