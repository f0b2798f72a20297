"""Makes a small checkpoint of SAM 3, without any download.

    python scripts/make_tiny_sam3.py --out tiny --layout video                         # random weights
    python scripts/make_tiny_sam3.py --out tiny --shapes --steps 250                   # "red", "green", "blue" ...
    python scripts/make_tiny_sam3.py --out tiny --task cheetah_run --steps 600         # the prompt of the task

A stand-in to try the whole pipeline without the gated weights: the architecture, the files and the code that loads them
are the real ones, the weights are not: they are 4000 times fewer, and random, or trained for minutes on coloured shapes
or on some hundred frames of one task with the masks of the simulator. It knows no other words or pictures. How good its
masks are says nothing about SAM 3, in either direction.

The simulator does not tell the concepts of a task apart: with `--task` each concept of its prompt is taught the whole
foreground.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from envs import make_env
from envs.segmentation.protocol import split_prompt
from envs.segmentation.sam3_images import compute_pixel_values
from envs.segmentation.sam3_weights import import_transformers
from envs.suite import TASKS, select_tasks

LAYOUTS = ("image", "video", "lite")
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (230, 220, 50)}
ABSENT = ("tree", "house", "banana")  # never in a picture

# (generator, count) -> uint8 images [count, h, w, 3] and, per prompt, bool masks [count, P, h, w]
Sampler = Callable[[torch.Generator, int], tuple[Tensor, Tensor]]


def make_tokenizer() -> Any:
    """A tokenizer of CLIP that reads letter by letter: 514 tokens, and no file of words."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return import_transformers().CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)


def make_config(image_size: int = 56, patch: int = 14, width: int = 32, queries: int = 5, *, lite: bool = False) -> Any:
    """The configuration of a small model.

    Args:
        image_size: height and width of its input in pixels, a multiple of `patch`.
        patch: pixels per side; the masks have four values per side of a patch.
        width: of all of its layers, a multiple of 16.
        queries: objects that it can find at once.
        lite: that of SAM3-LiteText.
    """
    transformers = import_transformers()
    grid = image_size // patch
    small = {"hidden_size": width, "intermediate_size": 48, "num_attention_heads": 2}
    backbone = {
        **small,
        "model_type": "sam3_vit_model",
        "num_hidden_layers": 2,
        "image_size": image_size,
        "patch_size": patch,
        "window_size": min(4, grid),
        "global_attn_indexes": [1],
        "pretrain_image_size": 4 * patch,
    }
    vision = {
        "model_type": "sam3_vision_model",
        "fpn_hidden_size": width,
        "backbone_feature_sizes": [[grid * scale] * 2 for scale in (4, 2, 1)],
        "backbone_config": backbone,
    }
    text = {**small, "vocab_size": 514, "projection_dim": 16, "num_hidden_layers": 1, "hidden_act": "gelu"}
    special = {"model_type": "clip_text_model", "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text |= {"max_position_embeddings": 16} if lite else {"max_position_embeddings": 32, **special}
    return (transformers.Sam3LiteTextConfig if lite else transformers.Sam3Config)(
        vision_config=vision,
        text_config=text,
        geometry_encoder_config={**small, "num_layers": 1, "roi_size": 2},
        detr_encoder_config={**small, "num_layers": 1},
        detr_decoder_config={**small, "num_layers": 1, "num_queries": queries},
        mask_decoder_config={"hidden_size": width, "num_upsampling_stages": 3, "num_attention_heads": 2},
    )


def make_model(config: Any, seed: int = 0) -> Any:
    """A `Sam3Model` or `Sam3LiteTextModel` with random weights from which a small model can learn."""
    transformers = import_transformers()
    lite = config.model_type == "sam3_lite_text"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (transformers.Sam3LiteTextModel if lite else transformers.Sam3Model)(config)
        for name, parameter in model.named_parameters():  # the usual ones, std 0.02, are far too small at this width
            if "embed" in name and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.5)
            elif parameter.ndim == 2:
                torch.nn.init.xavier_uniform_(parameter)
            elif parameter.ndim == 4:
                torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
    return model.eval()


def save_model(model: Any, folder: Path, layout: str = "image") -> Path:
    """Writes a checkpoint with its tokenizer.

    Args:
        model: as from `make_model`.
        folder: where to, made if need be.
        layout: "image" as `Sam3Model` writes it, "video" as the hub has it, inside of a `Sam3VideoModel`.
    """
    (wrap_in_video(model) if layout == "video" else model).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def wrap_in_video(detector: Any) -> Any:
    """A `Sam3VideoModel` with this detector and a random tracker."""
    transformers = import_transformers()
    found = detector.config
    width, size = found.detr_encoder_config.hidden_size, found.image_size
    patch = found.vision_config.backbone_config.patch_size
    tracker = transformers.Sam3TrackerVideoConfig(
        vision_config=found.vision_config.to_dict(),
        prompt_encoder_config={"hidden_size": width, "image_size": size, "patch_size": patch},
        mask_decoder_config={"hidden_size": width, "mlp_dim": 48, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        memory_attention_hidden_size=width,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=48,
        memory_attention_rope_feat_sizes=[size // patch] * 2,
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=64,  # the only number that the model takes
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=48,
        memory_fuser_num_layers=1,
        num_maskmem=2,
        max_object_pointers_in_encoder=2,
    )
    config = transformers.Sam3VideoConfig(
        detector_config=found.to_dict(), tracker_config=tracker.to_dict(), low_res_mask_size=size // patch * 4
    )
    config.image_size = size  # the sizes inside of the tracker's parts are not taken from above
    with torch.random.fork_rng(devices=[]):
        model = transformers.Sam3VideoModel(config)
    model.detector_model.load_state_dict(detector.state_dict())
    return model.eval()


def draw_shapes(
    generator: torch.Generator, count: int, size: int = 32, colours: Sequence[str] = tuple(COLOURS)
) -> tuple[Tensor, Tensor]:
    """Coloured discs and squares on a dull background, each of P colours in 60 % of the images.

    Returns:
        uint8 `[count, size, size, 3]`, and bool `[count, P, size, size]` in the order of `colours`.
    """
    images = 200 * random_texture(generator, count, size)  # [count, h, w, 3]
    images = 0.8 * images.mean(-1, keepdim=True) + 0.2 * images
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = torch.zeros(count, len(colours), size, size, dtype=torch.bool)
    for number in torch.randperm(len(colours), generator=generator).tolist():  # the last one is in front
        centre = torch.randint(size // 8, size - size // 8, (2, count, 1, 1), generator=generator)
        radius = torch.randint(size // 10, size // 5, (count, 1, 1), generator=generator)
        down, right = (rows - centre[0]).abs(), (columns - centre[1]).abs()  # [count, h, w]
        disc, square = down**2 + right**2 <= radius**2, down.maximum(right) <= radius
        is_disc, is_there = (
            torch.rand(2, count, 1, 1, generator=generator) < torch.tensor([0.5, 0.6])[:, None, None, None]
        )
        shape = torch.where(is_disc, disc, square) & is_there
        shade = torch.tensor(COLOURS[colours[number]]) + 20 * torch.randn(count, 1, 1, 3, generator=generator)
        images = torch.where(shape[..., None], shade, images)
        masks &= ~shape[:, None]
        masks[:, number] = shape
    return images.clamp(0, 255).to(torch.uint8), masks


def random_texture(generator: torch.Generator, count: int, size: int) -> Tensor:
    """Coloured noise, coarse or fine, smooth or in cells: float `[count, size, size, 3]` in [0, 1]."""
    cells = int(torch.tensor([2, 4, 8, 16])[torch.randint(4, (), generator=generator)])
    smooth = bool(torch.rand((), generator=generator) < 0.5)
    noise = torch.rand(count, 3, cells, cells, generator=generator)
    return F.interpolate(noise, (size, size), mode="bilinear" if smooth else "nearest").permute(0, 2, 3, 1)


def collect_frames(task: str, count: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of a task of dm_control under random actions, and the masks of the simulator.

    Returns:
        uint8 `[count, h, w, 3]` and bool `[count, h, w]`.
    """
    row = select_tasks([task])[0]
    options = {"frame_skip": row.frame_skip, "image_size": image_size, "seed": seed}
    env = make_env(name=row.domain, task=row.task, emit_mask=True, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = [env.rollout(32) for _ in range(-(-count // 32))]
    env.close()
    frames = torch.cat([episode["pixels"] for episode in found])[:count]
    return frames, torch.cat([episode["mask"][..., 0] for episode in found])[:count]


def make_task_sampler(frames: Tensor, masks: Tensor, concepts: int) -> Sampler:
    """Draws frames of a task, half of them in front of something else and some without the agent.

    Args:
        frames: uint8 `[N, h, w, 3]`.
        masks: bool `[N, h, w]`.
        concepts: how many there are, each of which is the whole foreground.
    """

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(frames), (count,), generator=generator)
        images, mask = frames[chosen].float(), masks[chosen]
        swap, leave_out = torch.rand(2, count, generator=generator) < torch.tensor([[0.7], [0.15]])
        mask = mask & ~(swap & leave_out)[:, None, None]
        background = 255 * random_texture(generator, count, images.shape[1])
        images = torch.where((~mask & swap[:, None, None])[..., None], background, images)
        images = images * (0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator))  # brightness
        return images.clamp(0, 255).to(torch.uint8), mask[:, None].expand(-1, concepts, -1, -1)

    return sample


def train_model(
    model: Any,
    prompts: Sequence[str],
    sample: Sampler,
    *,
    steps: int,
    batch: int = 16,
    rate: float = 4e-3,
    seed: int = 0,
) -> None:
    """Teaches a model its prompts, and that `ABSENT` is never there, without dropout.

    Args:
        model: as from `make_model`, changed in place.
        prompts: P of them.
        sample: draws images and masks.
        steps: of the optimiser.
        batch: images per step, each with one prompt.
        rate: greatest learning rate.
        seed: of the samples.
    """
    words = [*prompts, *ABSENT]
    tokens = make_tokenizer()(words, padding="max_length", max_length=32, return_tensors="pt")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-3, fused=True)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1)))
    )
    for _ in trange(steps, desc="training", disable=None):
        images, masks = sample(generator, batch)
        absent = torch.zeros(batch, len(ABSENT), *masks.shape[2:], dtype=torch.bool)
        chance = torch.tensor([1.0] * len(prompts) + [0.2 * len(prompts) / len(ABSENT)] * len(ABSENT))
        prompt = torch.multinomial(chance, batch, replacement=True, generator=generator)  # [batch]
        wanted = torch.cat([masks, absent], 1)[torch.arange(batch), prompt]  # [batch, h, w]
        output = model(
            pixel_values=compute_pixel_values(images, model.config.image_size),
            input_ids=tokens.input_ids[prompt],
            attention_mask=tokens.attention_mask[prompt],
        )
        optimizer.zero_grad()
        compute_loss(output, wanted).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def compute_loss(output: Any, wanted: Tensor) -> Tensor:
    """Cross entropy and overlap of the dense mask and of the best query's, and cross entropy of presence and scores.

    Args:
        output: of `Sam3Model` for N images.
        wanted: bool `[N, h, w]`, the mask of the prompt.
    """
    target = F.adaptive_avg_pool2d(wanted[:, None].float(), output.pred_masks.shape[-2:])[:, 0]  # [N, h', w']
    present = wanted.flatten(1).any(1).float()  # [N]
    entropy = F.binary_cross_entropy_with_logits

    def overlap(logits: Tensor, target: Tensor) -> Tensor:
        found = logits.sigmoid()
        both, sum_ = (found * target).sum((-2, -1)), (found + target).sum((-2, -1))
        return 1 - (2 * both + 1) / (sum_ + 1)

    def mask_loss(logits: Tensor, weight: Tensor) -> Tensor:
        pixels = entropy(logits, target, reduction="none").mean((-2, -1))
        return (4 * pixels * weight + overlap(logits, target) * present).mean()

    with torch.no_grad():
        cost = overlap(output.pred_masks, target[:, None]) - 0.5 * output.pred_logits.sigmoid()  # [N, Q]
        best = cost.argmin(1)
    rows = torch.arange(len(target))
    scores = torch.zeros_like(output.pred_logits)
    scores[rows, best] = present
    return (
        mask_loss(output.semantic_seg[:, 0], torch.ones_like(present))
        + mask_loss(output.pred_masks[rows, best], present)
        + entropy(output.presence_logits[:, 0], present)
        + (entropy(output.pred_logits, scores, reduction="none").mean(1) * present).mean()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--layout", choices=LAYOUTS, default="image", help="video: as on the hub; lite: SAM3-LiteText")
    learn = parser.add_mutually_exclusive_group()
    learn.add_argument("--shapes", action="store_true", help="learn to find coloured shapes")
    learn.add_argument("--task", choices=[name for name, row in TASKS.items() if not row.missing], metavar="TASK")
    parser.add_argument("--steps", type=int, help="of training, 250 by default")
    parser.add_argument("--frames", type=int, default=256, help="of the task, to learn from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps is not None and not (args.shapes or args.task):
        parser.error(f"--steps {args.steps}: nothing to learn; give --shapes or --task as well")
    if args.frames < 1:
        parser.error(f"--frames {args.frames}: at least 1")
    steps = 250 if args.steps is None else args.steps
    lite = args.layout == "lite"
    if args.shapes:
        prompts, model = tuple(COLOURS), make_model(make_config(32, 4, 32, 2, lite=lite), args.seed)
        train_model(model, prompts, draw_shapes, steps=steps, seed=args.seed)
    elif args.task:
        prompts = split_prompt(TASKS[args.task].prompt)
        model = make_model(make_config(64, 8, 32, 2, lite=lite), args.seed)
        sample = make_task_sampler(*collect_frames(args.task, args.frames, 64, args.seed), len(prompts))
        train_model(model, prompts, sample, steps=steps, seed=args.seed)
    else:
        model = make_model(make_config(lite=lite), args.seed)
    save_model(model, args.out, args.layout)
    print(
        f"{args.out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, input "
        f"{model.config.image_size} pixels; use it with\n"
        f"  dreamer/train.py: agent.mask_source=sam3 agent.segmentation.model={args.out} "
        "agent.segmentation.image_size=null\n"
        f"  scripts/preprocess_masks.py: --model {args.out}\n"
        f"  Python: Sam3('robot', '{args.out}')"
    )


if __name__ == "__main__":
    main()
