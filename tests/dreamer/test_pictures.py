"""What an agent shows of a replay sample: layout, what is imagined from what, and the values that are counted."""

import pytest
import torch

from dreamer.agents.pictures import CONTEXT_STEPS, IMAGINED_STEPS, choose_sequences
from objectives.functional import categorical_kl
from tests.helpers import ACTION, IMAGE, make_batch, make_env_spec, make_small_agent

HEIGHT, WIDTH, CHANNELS = IMAGE


def show(length, batch_size=3):
    """The media of a batch."""
    agent = make_small_agent(env_spec=make_env_spec(vector=False), randomize=True)
    batch = make_batch(agent, batch_size=batch_size, length=length)
    return agent, batch, make_media(agent, batch)


def make_media(agent, batch):
    """What the agent shows, with the same random numbers every time."""
    torch.manual_seed(0)
    return agent.make_media(batch)


def test_pictures_are_a_row_of_time_steps_for_each_sequence():
    _, batch, media = show(length=24)
    original, reconstructed = media.images["train/original"], media.images["train/reconstructed"]
    assert original.shape == reconstructed.shape == (3 * HEIGHT, 8 * WIDTH, CHANNELS)
    assert original.dtype == reconstructed.dtype == torch.uint8
    tiles = original.reshape(3, HEIGHT, 8, WIDTH, CHANNELS).transpose(1, 2)  # [B, 8, h, w, C]
    assert torch.equal(tiles[:, 0], batch["pixels"][:, 0]) and torch.equal(tiles[:, -1], batch["pixels"][:, -1])


def test_videos_of_the_batch_show_sequences_side_by_side():
    _, batch, media = show(length=24)
    observed = media.videos["train/observation_video"]
    assert observed.shape == media.videos["train/reconstruction_video"].shape == (24, HEIGHT, 3 * WIDTH, CHANNELS)
    assert torch.equal(observed, torch.cat(batch["pixels"].unbind(0), 2))
    still = media.images["train/reconstructed"].reshape(3, HEIGHT, 8, WIDTH, CHANNELS)
    last = media.videos["train/reconstruction_video"][-1].reshape(HEIGHT, 3, WIDTH, CHANNELS)
    assert torch.equal(still[:, :, -1].transpose(0, 1), last), "both show the same reconstruction"


@pytest.mark.parametrize(("length", "context"), [(24, 5), (20, 5), (12, 5), (8, 4), (4, 2), (2, 1)])
def test_comparison(length, context):
    """Real, reconstructed, imagined, error; the imagined column is the reconstructed one while the model sees."""
    _, batch, media = show(length)
    comparison = media.videos["train/imagination/comparison"]
    shown = min(length, CONTEXT_STEPS + IMAGINED_STEPS)
    assert comparison.shape == (shown, 3 * HEIGHT, 4 * WIDTH, CHANNELS) and comparison.dtype == torch.uint8
    real, reconstructed, imagined, error = comparison.split(WIDTH, 2)
    assert torch.equal(real, torch.cat(batch["pixels"][:, :shown].unbind(0), 1))
    same = (reconstructed == imagined).flatten(1).all(1)
    assert same.tolist() == [True] * context + [False] * (shown - context)
    assert ((real.int() - imagined.int()).abs() - error.int()).abs().max() <= 1  # rounded


def test_comparison_follows_the_recorded_actions_and_imagined_the_actor():
    agent, batch, media = show(length=20)
    other = batch.clone()
    other["action"][:, CONTEXT_STEPS:] *= -1
    changed = make_media(agent, other)
    column = [m.videos["train/imagination/comparison"].split(WIDTH, 2)[2] for m in (media, changed)]
    assert torch.equal(column[0][:CONTEXT_STEPS], column[1][:CONTEXT_STEPS])
    assert not torch.equal(column[0][CONTEXT_STEPS:], column[1][CONTEXT_STEPS:])
    imagined = media.videos["train/imagination/imagined"]
    assert imagined.shape == (IMAGINED_STEPS, HEIGHT, 3 * WIDTH, CHANNELS)
    assert torch.equal(imagined, changed.videos["train/imagination/imagined"]), "recorded actions do not matter"
    assert not torch.equal(torch.cat(imagined.split(WIDTH, 2), 1), column[0][CONTEXT_STEPS:])


def test_nothing_is_seen_after_the_context():
    agent, batch, media = show(length=20)
    other = batch.clone()
    other["pixels"][:, CONTEXT_STEPS:] = 0
    changed = make_media(agent, other)
    for name, columns in (("train/imagination/imagined", 0), ("train/imagination/comparison", 2)):
        videos = [m.videos[name] for m in (media, changed)]
        assert torch.equal(*(video.split(WIDTH, 2)[columns] for video in videos)), name


def test_sequences_without_a_reset_come_first():
    is_init = torch.zeros(6, 8, 1, dtype=torch.bool)
    is_init[0, 3] = is_init[2, 7] = True
    is_init[1, 0] = True  # at the start it does no harm
    assert choose_sequences(is_init).tolist() == [1, 3, 4, 5]
    assert choose_sequences(is_init[:3]).tolist() == [1, 0, 2]


def test_histograms_count_the_whole_batch():
    agent, batch, media = show(length=6, batch_size=5)
    rssm, counted = agent.loss.model.world_model.rssm, media.histograms
    assert len(counted) == 6 and all(value.ndim == 1 and value.dtype == torch.float32 for value in counted.values())
    for kind in ("prior", "posterior"):
        entropy = counted[f"histograms/{kind}_entropy"]
        assert len(entropy) == 5 * 6 * rssm.categoricals
        assert (entropy >= 0).all() and (entropy <= torch.tensor(rssm.classes).log() + 1e-5).all()
    torch.manual_seed(0)
    rollout = agent.loss.model.observe(batch)
    expected = categorical_kl(rollout.posterior_logits, rollout.prior_logits).flatten()
    assert torch.allclose(counted["histograms/kl"], expected)
    assert torch.equal(counted["histograms/action"], batch["action"].flatten())
    assert torch.equal(counted["histograms/reward"], batch["reward"].flatten())
    assert len(counted["histograms/value"]) == 5 * 6 and counted["histograms/value"].std() > 0


def test_agents_without_images_have_histograms_only():
    agent = make_small_agent(env_spec=make_env_spec(pixels=False, action=ACTION))
    media = agent.make_media(make_batch(agent))
    assert not media.images and not media.videos and len(media.histograms) == 6


def test_parameters_and_statistics_stay_as_they_were():
    agent = make_small_agent()
    before = {name: value.clone() for name, value in agent.loss.state_dict().items() if torch.is_tensor(value)}
    batch = make_batch(agent)
    copy = batch.clone()
    agent.make_media(batch)
    assert all(torch.equal(value, agent.loss.state_dict()[name]) for name, value in before.items())
    assert (batch == copy).all()
    assert all(parameter.grad is None for parameter in agent.loss.parameters())
