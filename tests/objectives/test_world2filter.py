"""The losses that take images apart: by hand, who is trained, and what they have in common with DreamerV3."""

import pytest
import torch
from torch.nn import functional as F
from torchrl.data import Binary

from objectives.segmentation_dreamer import masked_error, selective_weight
from tests.helpers import IMAGE, gradient_size, make_batch, make_env_spec, make_small_agent

AGENTS = ("world2filter", "segmentation_dreamer")
WORLD2FILTER = {
    "stop_gradient": ("agent=world2filter", "agent.background=stop_gradient"),
    "latent": ("agent=world2filter", "agent.background=latent"),
}
FREE = "agent.free_nats=0.0"


def spec(**options):
    env_spec = make_env_spec(**options)
    env_spec.observation["mask"] = Binary(shape=(*IMAGE[:2], 1), dtype=torch.bool)
    return env_spec


def make_agent(*overrides, **options):
    return make_small_agent(*overrides, env_spec=spec(), randomize=True, **options)


def labelled_batch(agent, **options):
    """A replay sample with random masks, of which all count."""
    batch = make_batch(agent, **options)
    generator = torch.Generator().manual_seed(3)
    batch["mask"] = torch.rand(batch["mask"].shape, generator=generator) > 0.7
    batch["mask_valid"].fill_(True)
    return batch


def terms(agent, batch):
    torch.manual_seed(0)
    return agent.loss.model.terms(batch)[0]


def fill_decoder(decoder, value: float) -> None:
    """Let a decoder say ``value`` everywhere."""
    with torch.no_grad():
        decoder.out.weight.zero_()
        decoder.out.bias.fill_(torch.logit(torch.tensor(value)))


class TestSelective:
    """x = 1 and x^ = 0.25 in four pixels: label and belief agree on the first and the last."""

    LABEL = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2, 1)
    BELIEF = torch.tensor([0.9, 0.1, 0.9, 0.1]).view(1, 1, 2, 2, 1)

    @pytest.mark.parametrize(("selective", "expected"), [("none", 1.25), ("false_negative", 1.1875), ("any", 0.625)])
    def test_masked_target(self, selective, expected):
        trust = selective_weight(self.BELIEF, self.LABEL, selective)
        image, prediction = torch.ones(1, 1, 2, 2, 1), torch.full((1, 1, 2, 2, 1), 0.25)
        error = masked_error(prediction, image, self.LABEL, trust, weighted=False)
        torch.testing.assert_close(error, torch.tensor([[expected]]))

    @pytest.mark.parametrize(("selective", "expected"), [("none", 1.125), ("false_negative", 1.125), ("any", 0.5625)])
    def test_weighted(self, selective, expected):
        """0.75^2 in each labelled pixel that is trusted; a weight of zero needs no distrust."""
        trust = selective_weight(self.BELIEF, self.LABEL, selective)
        image, prediction = torch.ones(1, 1, 2, 2, 1), torch.full((1, 1, 2, 2, 1), 0.25)
        error = masked_error(prediction, image, self.LABEL, trust, weighted=True)
        torch.testing.assert_close(error, torch.tensor([[expected]]))

    def test_unknown(self):
        with pytest.raises(ValueError, match="selective='sometimes': choose one of"):
            make_agent("agent=world2filter", "agent.selective=sometimes")

    @pytest.mark.parametrize(("source", "expected"), [("ground_truth", "none"), ("colour", "false_negative")])
    def test_only_the_simulator_is_trusted_by_default(self, source, expected):
        assert make_agent("agent=world2filter", f"agent.mask_source={source}").loss.model.selective == expected

    def test_a_distrusted_pixel_still_teaches_the_mask(self):
        """The foreground is believed everywhere and labelled nowhere: no image is learned, but the mask is."""
        agent = make_agent("agent=segmentation_dreamer", "agent.selective=false_negative")
        batch = labelled_batch(agent)
        batch["mask"].fill_(False)
        fill_decoder(agent.loss.model.world_model.decoders["pixels"], 0.75)
        batch["observation"].zero_()
        vectors = agent.loss.model.world_model.decoders["observation"]
        with torch.no_grad():
            vectors.out.weight.zero_(), vectors.out.bias.zero_()
        found = terms(agent, batch)
        assert found["model_reco"].abs().max() == 0
        torch.testing.assert_close(found["model_mask"], torch.full((2, 4), 256 * 0.75**2))


class TestByHand:
    """x = 51/255 = 0.2; the foreground is a quarter of 256 pixels; all decoders say 0.5, vectors 0 as they are."""

    @pytest.fixture
    def batch(self):
        agent = make_agent("agent=world2filter")
        batch = labelled_batch(agent)
        batch["pixels"].fill_(51)
        batch["observation"].zero_()
        batch["mask"].zero_()
        batch["mask"][:, :, :8, :8] = True
        return batch

    def terms(self, batch, *overrides):
        agent = make_agent(*overrides)
        model = agent.loss.model
        for decoder in (model.world_model.decoders["pixels"], getattr(model, "background", None)):
            if decoder is not None:
                fill_decoder(getattr(decoder, "decoder", decoder), 0.5)
        with torch.no_grad():
            model.world_model.decoders["observation"].out.weight.zero_()
            model.world_model.decoders["observation"].out.bias.zero_()
        return {name: float(term.detach().mean()) for name, term in terms(agent, batch).items()}

    def test_world2filter(self, batch):
        """64 and 192 pixels of three channels with an error of 0.3; the mask is 0.5 off everywhere."""
        found = self.terms(batch, "agent=world2filter")
        assert found["model_reco"] == pytest.approx(64 * 3 * 0.09, rel=1e-5)
        assert found["model_background"] == pytest.approx(192 * 3 * 0.09, rel=1e-5)
        assert found["model_mask"] == pytest.approx(256 * 0.25, rel=1e-5)
        assert found["model_background_kl"] == 0

    def test_without_weights_each_side_is_black_on_the_other(self, batch):
        """There the error is 0.5 instead of 0.3."""
        found = self.terms(batch, "agent=world2filter", "agent.weighted=false")
        assert found["model_reco"] == pytest.approx(64 * 3 * 0.09 + 192 * 3 * 0.25, rel=1e-5)
        assert found["model_background"] == pytest.approx(192 * 3 * 0.09 + 64 * 3 * 0.25, rel=1e-5)

    def test_segmentation_dreamer(self, batch):
        found = self.terms(batch, "agent=segmentation_dreamer")
        assert found["model_reco"] == pytest.approx(64 * 3 * 0.09 + 192 * 3 * 0.25, rel=1e-5)

    def test_soft_masks_weigh_by_their_share(self, batch):
        """A mask of 102/255 = 0.4 everywhere: 0.4 and 0.6 of 768 errors; (0.5 - 0.4)^2 in 256 pixels."""
        batch["mask"] = torch.full(batch["mask"].shape, 102, dtype=torch.uint8)
        found = self.terms(batch, "agent=world2filter")
        assert found["model_reco"] == pytest.approx(0.4 * 768 * 0.09, rel=1e-5)
        assert found["model_background"] == pytest.approx(0.6 * 768 * 0.09, rel=1e-5)
        assert found["model_mask"] == pytest.approx(2.56, rel=1e-4)

    @pytest.mark.parametrize("agent", AGENTS)
    def test_frames_without_a_label_count_for_nothing(self, batch, agent):
        labelled = self.terms(batch, f"agent={agent}")
        batch["mask_valid"][:, 1:] = False
        found = self.terms(batch, f"agent={agent}")
        for name in labelled.keys() & {"model_reco", "model_mask", "model_background"}:
            assert found[name] == pytest.approx(labelled[name] / 4, rel=1e-5), name

    def test_uint8_and_bool_masks_are_the_same(self, batch):
        hard = self.terms(batch, "agent=world2filter")
        batch["mask"] = batch["mask"].byte() * 255
        assert self.terms(batch, "agent=world2filter") == hard


def groups(agent):
    model, actor_critic = agent.loss.model, agent.loss.actor_critic
    modules = {
        "encoder": model.world_model.encoders,
        "rssm": model.world_model.rssm,
        "decoder": model.world_model.decoders,
        "heads": torch.nn.ModuleList([model.world_model.reward_head, model.world_model.continue_head]),
        "background": getattr(model, "background", torch.nn.Module()),
        "behaviour": torch.nn.ModuleList([actor_critic.actor, actor_critic.critic]),
    }
    return {name: list(module.parameters()) for name, module in modules.items()}


class TestWhoIsTrained:
    @pytest.mark.parametrize("background", WORLD2FILTER)
    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("model_reco", {"encoder", "rssm", "decoder"}),
            ("model_mask", {"encoder", "rssm", "decoder"}),
            ("model_background", {"background"}),
        ],
    )
    def test_each_loss(self, background, name, parts):
        agent = make_agent(*WORLD2FILTER[background], FREE)
        torch.manual_seed(0)
        agent.loss(labelled_batch(agent))[f"loss_{name}"].backward()
        assert {part for part, parameters in groups(agent).items() if gradient_size(parameters)} == parts

    def test_the_kl_of_the_background_trains_its_own_latent(self):
        agent = make_agent(*WORLD2FILTER["latent"])
        agent.loss(labelled_batch(agent))["loss_model_background_kl"].backward()
        assert {part for part, parameters in groups(agent).items() if gradient_size(parameters)} == {"background"}

    @pytest.mark.parametrize("overrides", [*WORLD2FILTER.values(), ("agent=segmentation_dreamer",)])
    def test_every_parameter_counts(self, overrides):
        agent = make_agent(*overrides, FREE)
        losses = agent.loss(labelled_batch(agent))
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        slow = set(agent.loss.actor_critic.slow_critic.parameters())
        for name, parameter in agent.loss.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (parameter not in slow), name

    @pytest.mark.parametrize("background", WORLD2FILTER)
    def test_the_background_does_not_change_the_gradient_of_the_rest(self, background):
        """Other pixels in the background as targets, same pixels as input: the task's networks learn the same."""

        def gradients(shift: int):
            agent = make_agent(*WORLD2FILTER[background], FREE)
            batch = labelled_batch(agent)
            encode, seen = agent.loss.model.world_model.encode, batch.clone()
            agent.loss.model.world_model.encode = lambda _: encode(seen)
            batch["pixels"] = torch.where(batch["mask"], batch["pixels"], batch["pixels"] + shift)
            torch.manual_seed(0)
            losses = agent.loss(batch)
            sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
            parameters = [p for part in ("encoder", "rssm", "decoder") for p in groups(agent)[part]]
            return losses["loss_model_background"].item(), [p.grad.clone() for p in parameters]

        loss, plain = gradients(0)
        other_loss, shifted = gradients(77)
        assert loss != other_loss
        for left, right in zip(plain, shifted, strict=True):
            torch.testing.assert_close(left, right)


class TestAllForeground:
    """With a mask of ones, both agents reconstruct what DreamerV3 does, from the same weights."""

    @pytest.mark.parametrize("overrides", [*WORLD2FILTER.values(), ("agent=segmentation_dreamer",)])
    def test_equals_dreamer_v3(self, overrides):
        plain, agent = make_agent(), make_agent(*overrides)
        weights = plain.loss.model.world_model.state_dict()
        own = agent.loss.model.world_model.state_dict()
        for name, weight in weights.items():
            if own[name].shape == weight.shape:
                own[name].copy_(weight)
            else:  # the mask is one more channel of the last layer
                own[name][:3].copy_(weight)
        batch = labelled_batch(agent)
        batch["mask"].fill_(True)
        left, right = terms(plain, batch), terms(agent, batch)
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-5)
        assert right["model_mask"].min() > 0
        if "model_background" in right:
            assert right["model_background"].abs().max() == 0


class TestBackground:
    @pytest.mark.parametrize("background", WORLD2FILTER)
    def test_learns(self, background):
        """Sequences of one colour each, its own networks alone: the error falls by more than half."""
        agent = make_agent(*WORLD2FILTER[background], "agent.background_share=1.0")
        batch, model = labelled_batch(agent), agent.loss.model
        batch["pixels"] = batch["pixels"][:, :1, :1, :1].expand_as(batch["pixels"]).contiguous()
        optimizer = torch.optim.Adam(model.background.parameters(), 1e-2)
        with torch.no_grad():
            rollout = model.observe(batch)
        errors = []
        for _ in range(60):
            error = (model.rebuild_background(rollout, batch)[0] - batch["pixels"] / 255).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            errors.append(error.item())
        assert errors[-1] < errors[0] / 2

    def test_latent_forgets_at_a_reset(self):
        """What was done before the start of an episode makes no difference after it."""
        agent = make_agent(*WORLD2FILTER["latent"])
        batch, model = labelled_batch(agent), agent.loss.model
        batch["is_init"][:, 2] = True
        rollout = model.observe(batch)

        def beliefs() -> torch.Tensor:
            torch.manual_seed(0)
            return model.rebuild_background(rollout, batch)[1].belief.detach()

        before = beliefs()
        batch["action"][:, 1] += 1.0
        assert torch.equal(beliefs()[:, 2:], before[:, 2:])
        assert not torch.equal(beliefs()[:, 1], before[:, 1])

    def test_latent_sees_actions(self):
        agent = make_agent(*WORLD2FILTER["latent"])
        batch = labelled_batch(agent)
        model = agent.loss.model
        torch.manual_seed(0)
        rollout = model.observe(batch)
        _, own = model.rebuild_background(rollout, batch)
        batch["action"][:, 2] += 1.0
        torch.manual_seed(0)
        model.observe(batch)
        _, other = model.rebuild_background(rollout, batch)
        differ = (own.belief != other.belief).flatten(2).any(-1).any(0)
        assert differ.tolist() == [False, False, True, True]

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("agent.background=none", r"agent\.background='none': choose one of"),
            ("agent.background_share=1.5", r"agent\.background_share=1\.5"),
            ("agent.mask_source=sam2", r"agent\.mask_source='sam2': choose one of"),
        ],
    )
    def test_bad_settings(self, override, message):
        with pytest.raises(ValueError, match=message):
            make_agent("agent=world2filter", override)

    @pytest.mark.parametrize("agent", AGENTS)
    def test_no_mask_and_no_image(self, agent):
        with pytest.raises(ValueError, match=r"env\.emit_mask=true"):
            make_small_agent(f"agent={agent}", env_spec=make_env_spec())
        with pytest.raises(ValueError, match=r"env\.from_pixels=true"):
            make_small_agent(f"agent={agent}", env_spec=make_env_spec(pixels=False))


@pytest.mark.parametrize("overrides", [*WORLD2FILTER.values(), ("agent=segmentation_dreamer",)])
def test_bfloat16(overrides):
    agent = make_agent(*overrides)
    batch = labelled_batch(agent)
    with torch.autocast("cpu", torch.bfloat16):
        losses = agent.loss(batch)
    assert all(value.isfinite() for key, value in losses.items() if key.startswith("loss_"))
    assert losses["loss_model_mask"].dtype == torch.float32


def test_own_latent_pays_its_kl():
    """The KL of the background is that of its own posterior against its own prior, summed over its latents."""
    agent = make_agent(*WORLD2FILTER["latent"])
    batch, model = labelled_batch(agent), agent.loss.model
    torch.manual_seed(0)
    rollout = model.observe(batch)
    _, own = model.rebuild_background(rollout, batch)
    posterior, prior = own.posterior_logits.flatten(0, 2), own.prior_logits.flatten(0, 2)  # [N * S, K]
    expected = F.kl_div(prior, posterior, reduction="none", log_target=True).sum(-1).view(2, 4, -1).sum(-1)
    torch.testing.assert_close(terms(agent, batch)["model_background_kl"], expected)


class TestTakeApart:
    """Decoders that say 0.5 everywhere, also of the mask: what is shown of them, pixel by pixel."""

    @pytest.fixture
    def model(self):
        model = make_agent("agent=world2filter").loss.model
        fill_decoder(model.world_model.decoders["pixels"], 0.5)
        fill_decoder(model.background.decoder, 0.25)
        return model

    def test_layers(self, model):
        batch = labelled_batch(make_agent("agent=world2filter"))
        layers = model.take_apart(model.observe(batch), batch)
        expected = {"foreground": 0.25, "mask": 0.5, "background": 0.25, "composite": 0.25 + 0.5 * 0.25}
        assert {name: round(layer.mean().item(), 5) for name, layer in layers.items()} == expected
        assert {name: layer.shape[-1] for name, layer in layers.items()} == dict.fromkeys(expected, 3) | {"mask": 1}

    def test_what_is_seen_of_a_model_state(self, model):
        """Weighted losses leave the image outside the mask to chance: it is blanked. Others teach it to be black."""
        rssm = model.world_model.rssm
        feature = torch.zeros(2, rssm.belief_size + rssm.state_size)
        torch.testing.assert_close(model.decode_pixels(feature), torch.full((2, *IMAGE), 0.25))
        model.weighted = False
        torch.testing.assert_close(model.decode_pixels(feature), torch.full((2, *IMAGE), 0.5))


def test_the_number_beside_the_pictures():
    """Believed everywhere and labelled on a quarter: 1/4. Frames without a label count for nothing."""
    agent = make_agent("agent=world2filter")
    fill_decoder(agent.loss.model.world_model.decoders["pixels"], 0.75)
    batch = labelled_batch(agent)
    batch["mask"].zero_()
    batch["mask"][:, :, :8, :8] = True
    batch["mask_valid"][:, 2:] = False
    batch["mask"][:, 2:] = False
    assert agent.make_media(batch).scalars["segmentation/model_iou"].item() == 0.25
    batch["mask_valid"].fill_(False)
    assert agent.make_media(batch).scalars == {}
