"""Small replays and records that tell their stream and position, for the tests of the replay."""

import torch
from tensordict import TensorDict

from dreamer.replay import SequenceReplay
from dreamer.replay_storage import RecordRings


def make_record(*, size=4, actions=2, belief=3) -> TensorDict:
    flag = torch.zeros(1, dtype=torch.bool)
    return TensorDict(
        {
            "pixels": torch.zeros(size, size, 3, dtype=torch.uint8),
            "action": torch.zeros(actions),
            "reward": torch.zeros(1),
            "is_init": flag,
            "terminated": flag,
            "done": flag,
            "belief": torch.zeros(belief, dtype=torch.bfloat16),
            "state": torch.zeros(2, dtype=torch.uint8),
        }
    )


def make_replay(**overrides) -> SequenceReplay:
    settings = {"capacity": 200, "num_streams": 2, "batch_size": 4, "sequence_length": 8, "online": False}
    record = overrides.pop("record", None)
    return SequenceReplay(make_record() if record is None else record, **settings | overrides)


def make_records(stream: int, first: int, count: int, **shapes) -> TensorDict:
    """Records whose action, reward and pixels tell their stream and position, and whose latents are zero."""
    position = torch.arange(first, first + count)
    records = make_record(**shapes).expand(count).clone()
    records["action"] += position[:, None]
    records["reward"] += stream
    records["pixels"] += (position % 251).to(torch.uint8)[:, None, None, None]
    records["stream"] = torch.full((count, 1), stream)
    return records


def fill(replay: RecordRings, stream: int, first: int, count: int, *, step: int = 20, **shapes) -> None:
    for begin in range(first, first + count, step):
        replay.extend(make_records(stream, begin, min(step, first + count - begin), **shapes))


def make_latents(value: float, batch_size: int = 4, sequence_length: int = 8) -> TensorDict:
    shape = (batch_size, sequence_length)
    return TensorDict(
        {
            "belief": torch.full((*shape, 3), value, dtype=torch.bfloat16),
            "state": torch.full((*shape, 2), int(value), dtype=torch.uint8),
        },
        batch_size=shape,
    )


def assert_equal(left: TensorDict, right: TensorDict) -> None:
    assert set(left.keys(True, True)) == set(right.keys(True, True))
    for key, value in left.items(True, True):
        assert torch.equal(value, right[key]), key
