"""Folders of pairs are whole after any end, shared by processes, and refused where they are another's or damaged."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pair_cases import Tiny, ddim, files, make
from torch import Tensor, nn

import deqdiff_fast as dq
from deqdiff_fast.distillation import Pairs, make_pairs, pair_folder


def test_processes_share_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "one", 500)
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        pairs = make(tmp_path / "three", 500)
        assert len(pairs) == [192, 372, 500][rank]  # shards 0 3 6, 1 4 7 and 2 5: of the last one there are 52
    assert files(tmp_path / "one") == files(tmp_path / "three")
    monkeypatch.setattr(make_pairs, "PATIENT", 0.0)
    with pytest.raises(TimeoutError, match=r"manifest.json: process 2 of 3 waited"):
        make(tmp_path / "nothing")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="expected 0 <= RANK < WORLD_SIZE"):
        make(tmp_path / "one")


def test_more_pairs_go_on_and_fewer_change_nothing(tmp_path: Path) -> None:
    make(tmp_path / "one", 200)
    for count in (70, 200, 10):
        model = Tiny()
        asked = []
        model.register_forward_hook(lambda module, args, out, asked=asked: asked.append(len(args[0])))
        assert len(make(tmp_path / "more", count, model)) == max(count, 200 if count == 10 else 0)
        of_chains = [rows for rows in asked if rows == 16]
        assert len(of_chains) == {70: 8 * 5, 200: 8 * 8, 10: 0}[count]  # none is made twice
    assert files(tmp_path / "one") == files(tmp_path / "more")


def test_another_model_schedule_or_setting_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "pairs")
    before = files(tmp_path / "pairs")
    for differs, settings in {
        "weights": {"model": Tiny(1)},
        "schedule": {"schedule": ddim(8, 0.5)},
        "seed": {"seed": 1},
        "batch": {"batch": 8},
        "method": {"method": "rounds"},
        "model_kwargs": {"model_kwargs": {"labels": torch.arange(5)}},
    }.items():
        with pytest.raises(dq.PairsMismatchError, match=differs) as caught:
            make(tmp_path / "pairs", **settings)
        assert differs in caught.value.differs
    make(tmp_path / "shared", model_kwargs={"labels": None})
    with pytest.raises(dq.PairsMismatchError, match="model_kwargs"):
        make(tmp_path / "shared", model_kwargs={"labels": dq.shared(torch.zeros(1, dtype=torch.int64))})
    plain = Tiny()
    make(tmp_path / "callable", model=lambda x, t: plain(x, t))  # has no weights that could be seen
    with pytest.raises(dq.PairsMismatchError, match="another model"):
        make(tmp_path / "callable", model=lambda x, t: 1.1 * plain(x, t))
    assert files(tmp_path / "pairs") == before


@pytest.mark.parametrize("how", ["cut", "bit", "header", "empty", "foreign"])
def test_a_damaged_shard_is_named_and_the_rest_is_of_use(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "pairs"
    pairs = make(folder)
    whole, path = files(folder), folder / "pairs-000001.safetensors"
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[-1000] ^= 4
    elif how == "header":
        data[20] ^= 4
    elif how == "foreign":
        make(tmp_path / "other", seed=1)
        data = bytearray((tmp_path / "other" / path.name).read_bytes())
    path.write_bytes(data[: {"cut": 500, "empty": 0}.get(how, len(data))])
    fresh = Pairs(folder)
    assert torch.equal(fresh[0]["sample"], pairs[0]["sample"])
    with pytest.raises(dq.DamagedPairsError, match=r"pairs-000001\.safetensors: expected") as caught:
        fresh[70]
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    assert fresh.verify() == [path]
    rest = Pairs(folder, partial=True)
    assert len(rest) == 150 - 64
    assert torch.equal(rest[64]["noise"], pairs[128]["noise"])
    make(folder)
    assert files(folder) == whole


def test_a_folder_that_is_not_finished(tmp_path: Path) -> None:
    pairs = make(tmp_path)
    (tmp_path / "pairs-000000.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"pairs-000000\.safetensors: 1 of 3 shards are missing or not finished"
    ):
        Pairs(tmp_path)
    assert torch.equal(Pairs(tmp_path, partial=True)[0]["noise"], pairs[64]["noise"])
    with pytest.raises(FileNotFoundError):
        Pairs(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(dq.DamagedPairsError, match=r"manifest\.json: expected the manifest"):
        Pairs(tmp_path)
    with pytest.raises(dq.DamagedPairsError, match=r"manifest\.json: expected the manifest"):
        make(tmp_path)


def test_killed_when_more_pairs_were_just_asked_for(tmp_path: Path) -> None:
    """The manifest is the new one, the last shard that there was is short."""
    pairs = make(tmp_path, 70)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "count": 120}))
    with pytest.raises(
        FileNotFoundError, match=r"pairs-000001\.safetensors: 1 of 2 shards are missing or not finished"
    ):
        Pairs(tmp_path)
    assert len(Pairs(tmp_path, partial=True)) == 64
    more = make(tmp_path, 120)
    assert len(more) == 120
    assert torch.equal(more[69]["sample"], pairs[69]["sample"])


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "one")
    written = []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 4:  # the manifest and its folder, the first shard and its folder
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pair_folder.os, "fsync", fsync)
        with pytest.raises(OSError, match=r"not written \(No space left on device\)") as caught:
            make(tmp_path / "two")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(files(tmp_path / "two")) == ["manifest.json", "pairs-000000.safetensors"]
    assert len(Pairs(tmp_path / "two", partial=True)) == 64
    make(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    usage = make_pairs.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(make_pairs.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="384 pairs take") as caught:
        make(tmp_path / "two", 500)
    assert caught.value.errno == errno.ENOSPC


def test_the_model_failing_leaves_what_was_made(tmp_path: Path) -> None:
    model = Tiny()
    calls = []

    def spoil(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        calls.append(len(out))
        return out * float("nan") if len(calls) > 50 else out

    handle = model.register_forward_hook(spoil)
    with pytest.raises(dq.NonFiniteError):
        make(tmp_path / "two", model=model)
    handle.remove()
    assert len(Pairs(tmp_path / "two", partial=True)) == 64
    make(tmp_path / "two", model=model)
    make(tmp_path / "one", model=model)
    assert files(tmp_path / "one") == files(tmp_path / "two")


KILLING = '''
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import pair_cases
from deqdiff_fast.distillation import pair_folder
COUNT, BATCH = 64 * 40, 64


class Slow(pair_cases.Tiny):
    def forward(self, x, t):
        time.sleep(0.002)
        return super().forward(x, t)


def make(folder, prepare=lambda: None):
    """In a process of its own; returns its id."""
    pid = os.fork()
    if pid == 0:
        prepare()
        pair_cases.make(pair_cases.Path(folder), COUNT, Slow(), batch=BATCH)
        os._exit(0)
    return pid


def die_at(name, call):
    """Makes the process die at that call of a function of `os`."""
    real, calls = getattr(os, name), []

    def dying(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(pair_folder.os, name, dying)


def killed(status):
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


one, two = sys.argv[1:]
assert os.waitpid(make(one), 0)[1] == 0
kills = leftovers = 0
for name, call in (("fsync", 1), ("replace", 1), ("fsync", 3), ("replace", 3)):  # of the manifest, and of a shard
    kills += killed(os.waitpid(make(two, lambda: die_at(name, call)), 0)[1])
    leftovers += any(name.endswith(".partial") for name in os.listdir(two))
draw = random.Random(int(time.time()))
while kills < 24:
    pid = make(two)
    time.sleep(draw.uniform(0.0, 0.1))
    os.kill(pid, signal.SIGKILL)
    kills += killed(os.waitpid(pid, 0)[1])
    leftovers += any(name.endswith(".partial") for name in os.listdir(two))
there = len(os.listdir(two))
assert os.waitpid(make(two), 0)[1] == 0
print(kills, leftovers, there)
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
def test_killed_again_and_again_it_ends_as_made_in_one_go(tmp_path: Path) -> None:
    """24 real SIGKILLs: at every step of writing a file, then at random moments."""
    script = tmp_path / "killing.py"
    script.write_text(KILLING.format(tests=str(Path(__file__).parent)))
    (tmp_path / "two").mkdir()
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "one"), str(tmp_path / "two")], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    kills, leftovers, there = map(int, run.stdout.split())
    assert kills == 24
    assert leftovers >= 4  # some were in the middle of writing
    assert 3 <= there <= 40  # they did not all come to nothing, nor after the end
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert sorted(one) == sorted(two)
    assert one == two
    assert len(one) == 41
    assert json.loads(one["manifest.json"])["count"] == len(Pairs(tmp_path / "two")) == 64 * 40
