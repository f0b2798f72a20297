"""Score a generation of controllers in a dream: as one batch, and one after the other.

    python scripts/bench_dream.py                                 # 64 candidates x 1000 steps, one CPU thread
    python scripts/bench_dream.py --device cuda --trials 16

Both use the same code with the same noise, and their returns are compared. No trial ends early. On a CPU the time is
that of the process, on a GPU that of the clock.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import describe_load, print_table, write_json
from torch import Tensor

from dreamer.models.controller import Controller
from dreamer.models.dream import dream, score
from dreamer.models.mdn_rnn import MDNRNN


def make_parts(args: argparse.Namespace) -> tuple[MDNRNN, Controller, Tensor, Tensor]:
    """A random model in which no trial ends, and a random population and start."""
    torch.manual_seed(args.seed)
    model = MDNRNN(latent_size=args.latent, action_size=args.actions, hidden_size=args.hidden).to(args.device)
    torch.nn.init.constant_(model.head.bias[-1:], -100.0)
    controller = Controller(in_features=args.latent + args.hidden, action_size=args.actions)
    parameters = 0.1 * torch.randn(args.candidates, controller.num_parameters)
    return model, controller, parameters.to(args.device), torch.randn(args.trials, args.latent).to(args.device)


def dream_returns(args: argparse.Namespace, model: MDNRNN, controller: Controller, *batch: Tensor) -> Tensor:
    """Returns [P, R] of the candidates in ``batch``."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    return score(dream(model, controller, *batch, length=args.length, generator=generator)).returns


def measure(args: argparse.Namespace, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds that ``run`` takes, and what it returns."""
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    begin = clock()
    returns = run().cpu()  # waits for the device
    return clock() - begin, returns


def bench(args: argparse.Namespace) -> list[dict]:
    """One row for the batch and one for the candidates alone."""
    model, controller, parameters, start = make_parts(args)
    steps = args.candidates * args.trials * args.length

    def batched() -> Tensor:
        return dream_returns(args, model, controller, parameters, start)

    def sequential() -> Tensor:
        alone = [dream_returns(args, model, controller, candidate[None], start) for candidate in parameters]
        return torch.cat(alone)

    rows, returns = [], []
    for name, run, repeats in (("one batch", batched, args.repeats), ("one by one", sequential, 1)):
        times, result = zip(*(measure(args, run) for _ in range(repeats)), strict=True)
        rows.append({"dream": name, "seconds": min(times), "steps/s": steps / min(times)})
        returns.append(result[0])
    torch.testing.assert_close(*returns, rtol=1e-2, atol=1e-2)
    return [row | {"to one by one": rows[-1]["seconds"] / row["seconds"]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=64, help="controllers of a generation")
    parser.add_argument("--trials", type=int, default=1, help="dreams of each candidate, always one batch")
    parser.add_argument("--length", type=int, default=1000, help="steps of a dream")
    parser.add_argument("--latent", type=int, default=32, help="latents")
    parser.add_argument("--hidden", type=int, default=256, help="width of the LSTM")
    parser.add_argument("--actions", type=int, default=3, help="action dimensions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of the batch; the shortest counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = bench(args)
    print(
        f"{args.candidates} candidates x {args.trials} trials x {args.length} steps on {args.device}, {describe_load()}"
    )
    print_table(rows, {"dream": "", "seconds": ".2f", "steps/s": ",.0f", "to one by one": ".1f"})
    write_json(args.json, vars(args), rows)


if __name__ == "__main__":
    main()
