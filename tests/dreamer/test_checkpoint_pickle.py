"""Checkpoints run no code, whatever is in them."""

import hashlib
import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import tensordict
import torch

from dreamer.checkpoint_files import DIGEST, MANIFEST, verify
from dreamer.checkpoints import load_checkpoint, load_weights
from tests.dreamer.test_checkpoint_files import forge
from tests.dreamer.test_checkpoints import SmallTrainer, make_save


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


class TestPickle:
    """A checkpoint from a stranger, whose manifest is in order."""

    def attack(self, path: Path, mark: Path) -> None:
        load = (lambda: load_checkpoint(SmallTrainer(), path), lambda: load_weights(SmallTrainer().loss_module, path))
        for each in load:
            with suppress(RuntimeError, ValueError):
                each()
        assert not mark.exists()

    def plant(self, path: Path, name: str, content: bytes) -> None:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(content)

        def seal(manifest):
            manifest["files"] = {
                file.relative_to(path).as_posix(): {
                    "size": file.stat().st_size,
                    "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                }
                for file in path.rglob("*")
                if file.is_file() and file.name not in (MANIFEST, DIGEST)
            }

        forge(path, seal)
        verify(path)

    def test_in_any_file(self, tmp_path):
        mark = tmp_path / "mark"
        bomb = pickle.dumps(Evil(mark))
        torch.save(Evil(mark), tmp_path / "bomb.pt")
        path = make_save(SmallTrainer(), tmp_path).save()
        for name in verify(path)["files"]:
            content = (path / name).read_bytes()
            for evil in (bomb, (tmp_path / "bomb.pt").read_bytes()):
                self.plant(path, name, evil)
                self.attack(path, mark)
            self.plant(path, name, content)
        pickle.loads(bomb)
        assert mark.exists()

    def test_where_torchrl_would_read_one(self, tmp_path):
        """Its own adapter follows a metadata file to a pickle."""
        mark = tmp_path / "mark"
        path = make_save(SmallTrainer(), tmp_path).save()
        part = Path(json.loads((path / MANIFEST).read_bytes())["components"]["loss"]["path"])
        bomb = pickle.dumps({"data": Evil(mark)})
        torch.save(Evil(mark), tmp_path / "bomb.pt")
        tensordict.TensorDict(part=tensordict.NonTensorData(object())).save(tmp_path / "stock")
        shutil.copytree(tmp_path / "stock", path / part / "state")
        self.plant(path, str(part / "state" / "part" / "other.pickle"), bomb)
        self.plant(path, str(part / "state.pt"), (tmp_path / "bomb.pt").read_bytes())
        self.attack(path, mark)
        with pytest.warns(FutureWarning, match="pickle"):  # the trap works
            tensordict.load(path / part / "state")
        assert mark.exists()
