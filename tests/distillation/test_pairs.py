"""Folders of pairs: the same whenever and by whomever they are made, and whole after any end."""

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
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import deqdiff_fast as dq
from deqdiff_fast.distillation import Pairs, make_pairs, pair_folder, pair_plan
from deqdiff_fast.distillation.pair_solver import Method, PairSolver, pair_seed

SHAPE = (2, 3, 3)


class Tiny(nn.Module):
    """A small perceptron; a class moves its answer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two, self.classes = nn.Linear(19, 32), nn.Linear(32, 18), nn.Embedding(5, 18)
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.one(torch.cat([x.flatten(1), t[:, None].to(x.dtype) / 1000], 1)).tanh()
        said = self.two(hidden) if labels is None else self.two(hidden) + 0.3 * self.classes(labels)
        return said.view_as(x)


def ddim(steps: int, eta: float = 0.0) -> dq.Schedule:
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return dq.Schedule.ddim(alphas, torch.arange(steps).flip(0) * (1000 // steps), eta=eta)


def make(folder: Path, count: int = 150, model: nn.Module | None = None, **settings) -> Pairs:
    given = {"method": "serial", "batch": 16, **settings}
    return Pairs.make(model or Tiny(), given.pop("schedule", ddim(8)), SHAPE, count, folder, **given)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_pair_is_what_the_sampler_makes_of_its_noise(tmp_path: Path, eta: float) -> None:
    schedule, model = ddim(8, eta), Tiny()
    pairs = make(tmp_path, schedule=schedule, model=model, seed=7)
    assert len(pairs) == 150
    for k in (0, 17, 149):
        stream = torch.Generator().manual_seed(pair_seed(7, k))
        noise = torch.randn(SHAPE, generator=stream)[None]
        found = pairs[k]
        assert torch.equal(found["noise"], noise[0])
        assert found["condition"] is None
        exact = dq.DEQSampler(model, schedule).serial(noise, generator=[stream]).sample[0]
        assert apart(found["sample"], exact) < 1e-5  # rounding of a batch of one
        assert found["sample"].dtype == torch.float32
    assert torch.equal(pairs[-1]["noise"], pairs[149]["noise"])
    with pytest.raises(IndexError):
        pairs[150]


def test_rounds_make_the_same_samples_to_tol_whatever_was_solved_before(tmp_path: Path) -> None:
    model, schedule = Tiny(), ddim(60)
    exact = make(tmp_path / "serial", 40, model, schedule=schedule)
    first = make(tmp_path / "one", 40, model, schedule=schedule, method="rounds", batch=4, tol=1e-3)
    noise = torch.randn(3, *SHAPE)
    for _ in range(3):  # teaches samplers of this model about its timesteps
        dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-4).sample(noise)
    make(tmp_path / "two", 20, model, schedule=schedule, method="rounds", batch=4, tol=1e-3)
    second = make(tmp_path / "two", 40, model, schedule=schedule, method="auto", tol=1e-3, batch=None)
    assert second.manifest.identity["method"] == "rounds"
    assert max(apart(a["sample"], b["sample"]) for a, b in zip(first, exact)) < 1e-3
    assert any(not torch.equal(a["sample"], b["sample"]) for a, b in zip(first, exact))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_where_rounds_cannot_be_as_exact_as_asked_the_chain_is_made(tmp_path: Path) -> None:
    model, schedule = Tiny().bfloat16(), ddim(60)
    rounds = make(tmp_path / "rounds", 4, model, schedule=schedule, method="rounds", batch=4, tol=1e-6)
    exact = make(tmp_path / "serial", 4, model, schedule=schedule, batch=4)
    assert max(apart(a["sample"], b["sample"]) for a, b in zip(rounds, exact)) < 1e-6


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


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    pairs = make(tmp_path, 100, model_kwargs={"labels": torch.arange(5)})
    found = load_file(tmp_path / "pairs-000001.safetensors")
    assert torch.equal(found["noise"][3], pairs[67]["noise"])
    assert torch.equal(found["sample"][3], pairs[67]["sample"])
    assert int(found["condition.labels"][3]) == int(pairs[67]["condition"]) == 67 % 5


def test_conditions(tmp_path: Path) -> None:
    model, schedule = Tiny(), ddim(8)
    rows = make(tmp_path / "rows", 50, model, model_kwargs={"labels": torch.tensor([3, 1, 4])})
    drawn = make(tmp_path / "drawn", 50, model, model_kwargs=lambda k: {"labels": torch.tensor([3, 1, 4])[k % 3]})
    sampler = dq.DEQSampler(model, schedule)
    for k in (0, 10, 49):
        assert int(rows[k]["condition"]) == [3, 1, 4][k % 3]
        exact = sampler.serial(rows[k]["noise"][None], {"labels": rows[k]["condition"][None]}).sample[0]
        assert apart(rows[k]["sample"], exact) < 1e-5
        assert torch.equal(rows[k]["sample"], drawn[k]["sample"])
    guided = dq.guided(model, {"labels": torch.tensor([3, 1, 4])}, {"labels": torch.tensor([0])}, 2.0)
    pairs = make(tmp_path / "guided", 50, guided)
    for k in (0, 10, 49):
        one = dq.guided(model, {"labels": pairs[k]["condition"][None]}, {"labels": torch.tensor([0])}, 2.0)
        exact = dq.DEQSampler(one, schedule).serial(pairs[k]["noise"][None]).sample[0]
        assert apart(pairs[k]["sample"], exact) < 1e-5
    assert apart(pairs[0]["sample"], rows[0]["sample"]) > 1e-2
    with pytest.raises(ValueError, match="expected tensors, got strings in 'prompt'"):
        make(tmp_path / "strings", 50, model, model_kwargs={"prompt": ["a", "b"]})


def test_a_data_loader_reads_them_in_processes(tmp_path: Path) -> None:
    pairs = make(tmp_path, 100, model_kwargs={"labels": torch.arange(5)})
    again = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(again[99]["sample"], pairs[99]["sample"])
    loader = DataLoader(again, batch_size=30, num_workers=2, collate_fn=Pairs.collate)
    batches = list(loader)
    assert [len(batch["noise"]) for batch in batches] == [30, 30, 30, 10]
    assert torch.equal(torch.cat([b["sample"] for b in batches]), torch.stack([p["sample"] for p in pairs]))
    assert torch.equal(torch.cat([b["condition"] for b in batches]), torch.arange(100) % 5)
    free = make(tmp_path / "free", 20)
    assert Pairs.collate([free[0], free[1]])["condition"] is None
    row = pairs[0]["noise"]
    row.zero_()  # a copy: neither the data set nor the file changes
    assert float(pairs[0]["noise"].norm()) > 0


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


def test_arguments(tmp_path: Path) -> None:
    for settings, message in (
        ({"count": 0}, "count"),
        ({"count": None}, "count"),
        ({"batch": 0}, "batch"),
        ({"method": "fast"}, "method"),
        ({"tol": -1.0}, "tol"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "pairs", **settings)
    with pytest.raises(TypeError, match="'sampler'"):
        make(tmp_path / "pairs", sampler=None)
    assert not (tmp_path / "pairs").exists()


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


class TestPlan:
    """The choice of a method, with a clock that is told what things take."""

    @staticmethod
    def solver(steps: int = 100) -> PairSolver:
        return PairSolver(Tiny(), ddim(steps), SHAPE, None, torch.empty(0), 0)

    def test_the_smallest_of_the_best_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        costs = {1: 8.0, 2: 4.1, 4: 2.1, 8: 1.004, 16: 1.0, 32: 1.01, 64: 1.1}
        asked = []
        monkeypatch.setattr(pair_plan, "serial_seconds", lambda solver, size: asked.append(size) or costs[size])
        assert pair_plan.fastest(pair_plan.row_costs(self.solver(), 10**6)) == 8
        assert max(asked) == 64  # three doublings were no better
        assert max(pair_plan.row_costs(self.solver(), 5)) == 4  # no larger than what is asked for

    @pytest.mark.parametrize(("rounds", "name"), [(60.0, "rounds"), (99.0, "serial"), (300.0, "serial")])
    def test_rounds_where_they_are_faster(self, monkeypatch: pytest.MonkeyPatch, rounds: float, name: str) -> None:
        monkeypatch.setattr(pair_plan, "serial_seconds", lambda solver, size: 1.0)
        monkeypatch.setattr(pair_plan, "rounds_seconds", lambda solver, method, serial: rounds)
        assert pair_plan.choose_method(self.solver(), 10**6, "auto", None).name == name
        assert pair_plan.choose_method(self.solver(), 3, "auto", None).name == "serial"  # too few to try
        assert pair_plan.choose_method(self.solver(), 3, "rounds", 2) == Method("rounds", 2)

    def test_it_is_made_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pairs = Pairs.make(Tiny(), ddim(8), SHAPE, 30, tmp_path)
        chosen = pairs.manifest.identity
        monkeypatch.setattr(make_pairs, "choose_method", lambda *args: pytest.fail("planned again"))
        again = Pairs.make(Tiny(), ddim(8), SHAPE, 60, tmp_path)
        assert again.manifest.identity == chosen


KILLING = '''
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import test_pairs
from deqdiff_fast.distillation import pair_folder
COUNT, BATCH = 64 * 40, 64


class Slow(test_pairs.Tiny):
    def forward(self, x, t):
        time.sleep(0.002)
        return super().forward(x, t)


def make(folder, prepare=lambda: None):
    """In a process of its own; returns its id."""
    pid = os.fork()
    if pid == 0:
        prepare()
        test_pairs.make(test_pairs.Path(folder), COUNT, Slow(), batch=BATCH)
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
