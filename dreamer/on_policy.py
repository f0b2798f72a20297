"""On-policy learning: a policy without memory, and epochs of minibatches of what is new."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.objectives import LossModule
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

from dreamer.agents.parts import ActionCodec
from dreamer.models.ppo_networks import LIMIT, Moments
from dreamer.nonfinite import all_finite, describe_update
from dreamer.steppers import AUTOCAST, gradient_norm, minimised

REWARDS, ANNEALED = ("raw", "scaled", "sign"), ("lr", "clip")


class ReactivePolicy(TensorDictModuleBase):
    """The acting policy: sample the actor, and let the environment carry the log-probability to the next record.

    Reads: observation keys, previous_action [A].
    Writes: action [A]; ("next", "log_prob") [1].
    """

    def __init__(self, actor: ProbabilisticTensorDictSequential, codec: ActionCodec):
        super().__init__()
        self.actor, self.codec = actor, codec
        self.observation_keys = list(actor.in_keys)
        self.in_keys = [*self.observation_keys, "previous_action"]
        self.out_keys = ["action", ("next", "log_prob")]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        distribution = self.actor.get_dist(tensordict.select(*self.observation_keys))
        sampled = exploration_type() in (ExplorationType.RANDOM, None)
        action = distribution.sample() if sampled else distribution.deterministic_sample
        tensordict["action"] = self.codec.decode(action).reshape(tensordict["previous_action"].shape)
        tensordict["next", "log_prob"] = distribution.log_prob(action)[..., None]
        return tensordict


def make_primers() -> TensorDictPrimer:
    """What an environment carries for :class:`ReactivePolicy`: zero at every reset."""
    return TensorDictPrimer(log_prob=Unbounded(1), random=False, default_value=0.0, expand_specs=True)


class Rewards:
    """Rewards as an agent learns from them.

    Scaled ones are in deviations of the discounted return so far, ``R_t = gamma R_{t-1} + r_t``, and within 10.

    Args:
        kind: "raw", "scaled", or "sign" for -1, 0 and 1.
        gamma: Discount per step.

    Raises:
        ValueError: for an unknown ``kind``.

    Source: Engstrom et al. 2020, section 3; the signs are those of Mnih et al. 2015.
    Differs: the deviation comes from all steps of a batch before any of them is scaled.
    """

    def __init__(self, kind: str, gamma: float):
        if kind not in REWARDS:
            raise ValueError(f"agent.rewards={kind!r}: choose one of {REWARDS}")
        self.kind, self.gamma, self.moments = kind, gamma, Moments(1)
        self.returns: dict[int, float] = {}  # of the episode under way in each stream

    def __call__(self, records: TensorDictBase) -> Tensor:
        """Records [R] in time order within each stream to rewards [R, 1]."""
        reward = records["reward"]
        if self.kind == "raw":
            return reward
        if self.kind == "sign":
            return reward.sign()
        seen = []
        columns = (records[key].flatten().tolist() for key in ("stream", "reward", "is_init"))
        for stream, value, is_init in zip(*columns, strict=True):
            self.returns[stream] = 0.0 if is_init else self.gamma * self.returns.get(stream, 0.0) + value
            if not is_init:
                seen.append(self.returns[stream])
        if seen:
            self.moments.update_(torch.tensor(seen)[:, None])
        return (reward / (self.moments.variance + 1e-8).sqrt()).clamp(-LIMIT, LIMIT)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments.state_dict(), "returns": sorted(self.returns.items())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.moments.load_state_dict(state_dict["moments"])
        self.returns = dict(state_dict["returns"])


class Rollouts:
    """Learn from every transition in a few epochs, right after it was collected.

    A transition leads from one record to the next of the same episode. The newest record of a stream waits for the
    batch that has the one after it, so no step is lost; its action is one batch older than the others, and the
    log-probability that was recorded with it says so.

    Args:
        observation_keys: Of the records.
        compute_advantage: TorchRL's :class:`GAE`, or the like: transitions [1, M] in time order -> the same with
            ``advantage``, ``value_target`` and ``state_value`` [1, M, 1].
        epochs: Times that each transition is learned from.
        minibatch_size: Transitions per update, as nearly as equal parts allow.
        device: Where the learner lives.
        rewards: What is learned from in place of the collected rewards; None for those.
        update_statistics: Called with the transitions [M] after the last update of a batch: until then the policy
            is the one that collected it.

    Raises:
        ValueError: for counts below 1.
    """

    def __init__(
        self,
        observation_keys: tuple[str, ...],
        compute_advantage: Callable[[TensorDictBase], TensorDictBase],
        *,
        epochs: int,
        minibatch_size: int,
        device: torch.device,
        rewards: Rewards | None = None,
        update_statistics: Callable[[TensorDictBase], None] | None = None,
    ):
        if epochs < 1 or minibatch_size < 2:
            raise ValueError(f"agent.epochs={epochs}, agent.minibatch_size={minibatch_size}: give at least 1 and 2")
        self.observation_keys, self.compute_advantage = observation_keys, compute_advantage
        self.epochs, self.minibatch_size, self.device = epochs, minibatch_size, device
        self.rewards, self.update_statistics = rewards, update_statistics
        self.newest: TensorDictBase | None = None  # [S] the last record of each stream
        self.transitions: TensorDictBase | None = None  # [M] while there are updates to make
        self.minibatches: list[Tensor] = []  # rows of the transitions, one entry per update that is owed

    def register(self, trainer: Trainer) -> None:
        """Register the hooks of this schedule, and its state."""
        self.trainer = trainer
        trainer.register_op("batch_process", self.receive)
        trainer.register_op("pre_optim_steps", self.shuffle)
        trainer.register_op("process_optim_batch", self.draw)
        trainer.register_op("post_optim", self.finish)
        trainer.register_module(type(self).__name__, self)

    def busy(self) -> bool:
        """Never: every turn begins with new steps."""
        return False

    def receive(self, records: TensorDictBase) -> TensorDictBase:
        """Turn records into transitions with advantages."""
        known = records if self.rewards is None else records.copy().set("reward", self.rewards(records))
        known = known if self.newest is None else torch.cat([self.newest, known])
        known = known[known["stream"].flatten().argsort(stable=True)]
        transitions, self.newest = to_transitions(known, self.observation_keys)
        self.transitions = None
        if len(transitions):
            transitions = self.compute_advantage(transitions.to(self.device)[None])
            self.transitions = transitions.exclude("next")[0]
        return records

    def shuffle(self) -> None:
        """Deal the transitions out to minibatches, anew in every epoch."""
        count = 0 if self.transitions is None else len(self.transitions)
        parts = max(1, round(count / self.minibatch_size)) if count > 1 else 0
        self.minibatches = [
            rows for _ in range(self.epochs if parts else 0) for rows in torch.randperm(count).tensor_split(parts)
        ]
        self.trainer.optim_steps_per_batch = len(self.minibatches)

    def draw(self, batch: TensorDictBase | None) -> TensorDictBase:
        """Take the next minibatch."""
        return self.transitions[self.minibatches.pop(0).to(self.device)]

    def finish(self) -> None:
        """Bring statistics up to date when an update was the last of its batch."""
        if self.trainer.pending_updates == 1:  # this one, also where the stepper gave up the others
            self.minibatches = []
            if self.update_statistics is not None:
                self.update_statistics(self.transitions)

    def state_dict(self) -> dict[str, Any]:
        """What is waiting: the newest records, and the transitions that are still to be learned from."""
        data = {"newest": self.newest, "transitions": self.transitions if self.minibatches else None}
        packed = {name: None if value is None else value.to_dict() for name, value in data.items()}
        rewards = None if self.rewards is None else self.rewards.state_dict()
        return packed | {"minibatches": list(self.minibatches), "rewards": rewards}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there."""
        newest, transitions = state_dict["newest"], state_dict["transitions"]
        self.newest = None if newest is None else TensorDict(newest, len(newest["stream"]))
        self.transitions = None
        if transitions is not None:
            self.transitions = TensorDict(transitions, len(transitions["advantage"])).to(self.device)
        self.minibatches = list(state_dict["minibatches"])
        if self.rewards is not None:
            self.rewards.load_state_dict(state_dict["rewards"])


def to_transitions(records: TensorDictBase, observation_keys: tuple[str, ...]) -> tuple[TensorDict, TensorDictBase]:
    """Pair each record with the one after it.

    A transition has TorchRL's layout: an observation, the action taken there, and under ``next`` what it led to.
    ``done`` also marks the last one of a stream, so that whatever runs over time stops there, and starts from the value
    of what was seen last unless that is ``terminated``.

    Args:
        records: [R] stream by stream and in time order: see :mod:`dreamer.replay`, with ``log_prob`` [R, 1] of the
            action that was taken there, and ``stream`` [R, 1].
        observation_keys: What an observation consists of.

    Returns:
        The transitions [M], and the last record of each stream [S].
    """
    stream = records["stream"].flatten()
    follows = (stream[1:] == stream[:-1]) & ~records["is_init"].flatten()[1:]  # [R - 1] record i + 1 comes from i
    start = follows.nonzero().squeeze(-1)  # [M]
    here, there = records[start], records[start + 1]
    cut = ~F.pad(follows, (0, 1))[start + 1]  # [M] nothing comes from the record that it leads to
    following = there.select(*observation_keys, "reward", "done", "terminated")
    following["done"] = following["done"] | cut[:, None]
    transitions = here.select(*observation_keys)
    transitions.update({"action": there["action"], "log_prob": here["log_prob"].squeeze(-1), "next": following})
    last = torch.cat([stream[1:] != stream[:-1], torch.ones(1, dtype=torch.bool)])
    return transitions, records[last]


class ClippedStepper(OptimizationStepper):
    """One backward and one step of Adam for the whole loss, with a bounded gradient norm.

    Args:
        loss: Its ``loss_*`` entries are summed.
        names: Names under which entries of the loss are reported.
        lr, eps: Of Adam.
        max_grad_norm: Largest L2 norm of the joint gradient.
        anneal: What falls linearly to 0 over the run: "lr", and "clip", the ``clip_epsilon`` of the loss.
        target_kl: Leave out the rest of a batch's updates once the ``kl_approx`` of the loss, in nats, exceeds this;
            None to make them all.
        autocast: "bfloat16", False, or "auto": bfloat16 on a GPU and float32 on a CPU.
        compile: ``{"enabled": bool}``: compile the networks.
        cudagraph: Must be False, because minibatches differ in size.

    Raises:
        ValueError: for an unknown ``autocast`` or entry of ``anneal``, or with ``cudagraph``.
    """

    def __init__(
        self,
        loss: LossModule,
        names: Mapping[str, str],
        *,
        lr: float,
        eps: float,
        max_grad_norm: float,
        anneal: Sequence[str],
        target_kl: float | None,
        autocast: str | bool,
        compile: Mapping[str, Any],
        cudagraph: bool,
    ):
        self.parameters = [p for p in loss.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        if autocast not in AUTOCAST:
            raise ValueError(f"optimization.autocast={autocast!r}: choose one of {AUTOCAST}")
        if cudagraph:
            raise ValueError("optimization.cudagraph=true: minibatches differ in size, give cudagraph=false")
        if isinstance(anneal, str) or not set(anneal) <= set(ANNEALED):
            raise ValueError(f"optimization.anneal={anneal!r}: give a list of {ANNEALED}")
        self.loss, self.names, self.lr, self.eps, self.anneal = loss, dict(names), lr, eps, tuple(anneal)
        self.max_grad_norm, self.target_kl = max_grad_norm, target_kl
        self.clip = float(loss.clip_epsilon) if "clip" in anneal else None
        self.autocast = autocast == "bfloat16" or (autocast == "auto" and self.device.type == "cuda")
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=eps)
        self.compute_losses = torch.compile(loss) if compile["enabled"] else loss

    def step(self, trainer: Trainer | None, sub_batch: TensorDictBase) -> TensorDictBase:
        """Make one update from ``sub_batch`` and return its detached scalars.

        Raises:
            NonFiniteError: if a loss or the gradient is not finite; nothing has changed then.
        """
        share = 1.0 if trainer is None else share_left(trainer)
        if self.clip is not None:
            self.loss.clip_epsilon.fill_(self.clip * share)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            losses = self.compute_losses(sub_batch)
        sum(minimised(losses).values()).backward()
        losses, norm = losses.detach(), gradient_norm(self.parameters)
        if not all_finite(minimised(losses) | {"norm": norm}):
            raise describe_update("an update", losses, {"ac/grad_norm": norm}, sub_batch)
        nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        lr = self.lr * share if "lr" in self.anneal else self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.target_kl is not None and trainer is not None and losses["kl_approx"] > self.target_kl:
            trainer.pending_updates = 1  # this one is the last
        metrics = {self.names.get(key, key): value.mean() for key, value in losses.items()}
        return TensorDict(metrics | {"ac/grad_norm": norm, "ac/lr": torch.tensor(lr)})

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over averages and counters; learning rate and ``eps`` stay those of this stepper."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for group in self.optimizer.param_groups:
            group.update(lr=self.lr, eps=self.eps)


def share_left(trainer: Trainer) -> float:
    """Share of the frames that were still to come when the present batch began, in [0, 1]."""
    before = trainer.collected_frames - trainer.collector.requested_frames_per_batch * trainer.frame_skip
    return min(max(1 - before / trainer.total_frames, 0.0), 1.0)
