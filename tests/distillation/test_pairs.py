"""Pairs of noises and samples: the same whenever and by whomever they are made."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from pair_cases import SHAPE, Tiny, apart, ddim, files, make
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import deqdiff_fast as dq
from deqdiff_fast.distillation import Pairs, make_pairs, pair_plan
from deqdiff_fast.distillation.pair_solver import Method, PairSolver, pair_seed


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


def test_pairs_in_channels_last(tmp_path: Path) -> None:
    formats: set[bool] = set()

    class Looking(Tiny):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            formats.add(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
            return super().forward(x, t)

    model = Looking()
    exact = make(tmp_path / "plain", 40, model)
    assert formats == {False}
    formats.clear()
    make(tmp_path / "some", 20, model, channels_last=True)
    some = make(tmp_path / "some", 40, model)  # goes on as it was begun
    assert True in formats
    assert max(apart(a["sample"], b["sample"]) for a, b in zip(some, exact)) < 1e-5
    make(tmp_path / "one", 40, model, channels_last=True)
    assert files(tmp_path / "one") == files(tmp_path / "some")
    with pytest.raises(dq.PairsMismatchError, match="channels_last"):
        make(tmp_path / "some", 40, model, channels_last=False)
    rounds = {"schedule": ddim(60), "channels_last": True, "method": "auto", "batch": None}
    make(tmp_path / "rounds", 4, model, **(rounds | {"method": "rounds", "channels_last": None, "batch": 4}))
    assert len(make(tmp_path / "rounds", 8, model, **rounds)) == 8  # which have no such format


def test_where_rounds_cannot_be_as_exact_as_asked_the_chain_is_made(tmp_path: Path) -> None:
    model, schedule = Tiny().bfloat16(), ddim(60)
    rounds = make(tmp_path / "rounds", 4, model, schedule=schedule, method="rounds", batch=4, tol=1e-6)
    exact = make(tmp_path / "serial", 4, model, schedule=schedule, batch=4)
    assert max(apart(a["sample"], b["sample"]) for a, b in zip(rounds, exact)) < 1e-6


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


def test_arguments(tmp_path: Path) -> None:
    for settings, message in (
        ({"count": 0}, "count"),
        ({"count": None}, "count"),
        ({"batch": 0}, "batch"),
        ({"method": "fast"}, "method"),
        ({"method": "rounds", "channels_last": True}, "channels_last"),
        ({"channels_last": "yes"}, "channels_last"),
        ({"tol": -1.0}, "tol"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "pairs", **settings)
    with pytest.raises(TypeError, match="'sampler'"):
        make(tmp_path / "pairs", sampler=None)
    assert not (tmp_path / "pairs").exists()


class TestPlan:
    """The choice of a method, with a clock that is told what things take."""

    @staticmethod
    def solver(steps: int = 100) -> PairSolver:
        return PairSolver(Tiny(), ddim(steps), SHAPE, None, torch.empty(0), 0)

    def test_the_smallest_of_the_best_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        costs = {1: 8.0, 2: 4.1, 4: 2.1, 8: 1.004, 16: 1.0, 32: 1.01, 64: 1.1}
        asked = []
        monkeypatch.setattr(pair_plan, "serial_seconds", lambda _, each: asked.append(each.batch) or costs[each.batch])
        assert pair_plan.fastest(pair_plan.row_costs(self.solver(), 10**6, [False])) == Method("serial", 8)
        assert max(asked) == 64  # three doublings were no better
        most = max(each.batch for each in pair_plan.row_costs(self.solver(), 5, [False]))
        assert most == 4  # no larger than what is asked for

    @pytest.mark.parametrize(("gain", "chosen"), [(0.9, True), (1.1, False)])
    def test_the_faster_memory_format(self, monkeypatch: pytest.MonkeyPatch, gain: float, chosen: bool) -> None:
        costs = {False: 1.0, True: gain}
        monkeypatch.setattr(pair_plan, "serial_seconds", lambda _, each: costs[each.channels_last] / each.batch)
        assert pair_plan.choose_method(self.solver(), 64, "serial", None) == Method("serial", 64, chosen)
        assert pair_plan.choose_method(self.solver(), 64, "auto", 16) == Method("serial", 16, False)
        assert pair_plan.choose_method(self.solver(), 64, "serial", 16, True) == Method("serial", 16, True)

    @pytest.mark.parametrize("fault", ["strides", "values"])
    def test_no_memory_format_in_which_the_model_fails_or_says_something_else(self, fault: str) -> None:
        class Contiguous(Tiny):
            def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                rows = x.view(len(x), -1) if fault == "strides" else x.as_strided((len(x), 18), (18, 1))
                return super().forward(rows, t).view(x.shape)

        formats = [
            pair_plan.memory_formats(PairSolver(model, ddim(8), SHAPE, None, torch.empty(0), 0))
            for model in (Tiny(), Contiguous())
        ]
        assert formats == [[False, True], [False]]

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
