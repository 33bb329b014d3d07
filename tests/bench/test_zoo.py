"""The zoo's models, trained for a step or two: the benchmark runs, and the author's loops are the library's chains."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import deqdiff_fast as dq

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "__main__.py").is_file(), reason="bench/ is not beside the tests")

NAMES = ("digits", "guided", "signal", "imputation", "policy", "graph")


@pytest.fixture
def zoo(baseline):
    """The package bench.zoo."""
    import bench.zoo

    return bench.zoo


@pytest.fixture
def member(zoo, tmp_path):
    """A model of the zoo by name, and its network after one training step."""

    def build(name: str):
        if name in ("digits", "guided"):
            pytest.importorskip("sklearn")
        found = zoo.MEMBERS[name]
        return found, found.net(tmp_path, 1, "cpu")

    return build


@pytest.mark.parametrize("name", NAMES)
def test_zoo(figures, zoo, tmp_path, name):
    """In miniature; networks that were hardly trained make chains as well."""
    if name in ("digits", "guided"):
        pytest.importorskip("sklearn")
    words = ("--fit", "2", "--steps", "6", "--noises", "1", "--passes", "2", "--cache", tmp_path / "cache")
    report, table = figures("zoo", "--models", name, *words)
    etas = {chain.eta for chain in zoo.MEMBERS[name].chains}
    assert {(row["model"], row["steps"], row["eta"]) for row in report["rows"]} == {(name, 6, eta) for eta in etas}
    assert sum(line.startswith(f"| {name} ") for line in table.splitlines()) == len(etas)
    for row in report["rows"]:
        ((solve, plan),) = ((run["solve"], run["planned"]) for run in row["runs"])
        assert solve["rounds_to"][1] <= solve["rounds_to"][0] <= 6
        assert solve["error"] == pytest.approx(solve["curve"][-1], rel=1e-3, abs=1e-6)
        assert solve["evaluations"] >= solve["rounds"] >= 1
        assert len(plan["ratios"]) == 2
        pairs = zip(plan["ratios"], plan["loop_seconds"], plan["sample_seconds"], strict=True)
        assert all(ratio == pytest.approx(loop / sample) for ratio, loop, sample in pairs)
        if row["eta"] == 0:
            assert plan["loop_error"] <= 1e-4


def test_weights_are_kept(zoo, tmp_path, capsys):
    """The second time nothing is trained; other settings and other code are trained anew, other words are not."""
    cache = zoo._cache
    first = cache.trained("graph", tmp_path, 3)
    assert "training graph" in capsys.readouterr().err
    kept = cache.trained("graph", tmp_path, 3)
    assert "training" not in capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert file == cache.path(tmp_path, "graph", 3)
    assert file != cache.path(tmp_path, "graph", 4)
    for a, b in zip(first.state_dict().values(), kept.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    file.unlink()
    again = cache.trained("graph", tmp_path, 3)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_what_weights_are_kept_under(zoo, tmp_path):
    texts = ('"""Says what."""\nX = 1\n', '"""Says more."""\n\n# why\nX = 1  # so\n', '"""Says what."""\nX = 2\n')
    files = [tmp_path / f"{k}.py" for k in range(3)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    plain, described, other = (zoo._cache._code(argparse.Namespace(__file__=str(file))) for file in files)
    assert plain == described != other


def test_training_lowers_the_loss(zoo):
    train, recipe = sys.modules["bench.zoo._train"], sys.modules["bench.zoo._recipes"].RECIPES["graph"]
    test = recipe.batches(256, torch.Generator().manual_seed(5))
    nets = [train.fit("graph", replace(recipe, batch=16), steps) for steps in (1, 40)]
    with torch.no_grad():
        before, after = (float(test.loss(net)) for net in nets)
    assert after < 0.8 * before


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_is_the_serial_chain(zoo, member, name):
    """With noise on the way too, given the same draws."""
    found, net = member(name)
    for eta in dict.fromkeys(chain.eta for chain in found.chains):
        chain = zoo.Chain(9, eta)
        request, noise = (
            found.ask(net, 3, "cpu"),
            torch.randn(1, *found.shape, generator=torch.Generator().manual_seed(1)),
        )
        draws = torch.Generator().manual_seed(2)
        serial = dq.DEQSampler(request.model, found.schedule(chain)).serial(noise, request.kwargs, [draws])
        draws.manual_seed(2)
        extra = {} if found.abar is None else {"draw": lambda x, draws=draws: torch.randn(x.shape, generator=draws)}
        torch.testing.assert_close(found.loop(chain, request)(noise, **extra), serial.sample, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["imputation", "graph"])
def test_entries_without_weight_are_never_read(member, name):
    found, net = member(name)
    request = found.ask(net, 0, "cpu")
    x, weight = torch.randn(1, *found.shape), request.weight
    assert weight.shape == found.shape
    assert 0 < weight.sum() < weight.numel()
    t = torch.tensor([7])
    out, moved = request.predict(x, t), request.predict(x + 100 * (1 - weight), t)
    assert torch.equal(out, moved)
    assert not torch.equal(out, request.predict(x + 0.1 * weight, t))


def test_data(zoo):
    data, draw = zoo._cache._data, torch.Generator().manual_seed(0)
    for sample in (data.signals(500, draw), data.series(500, draw)):
        assert 0.3 < float(sample.std()) < 1.5
    mask = data.node_counts(300, draw)
    assert set(mask.sum(1).tolist()) == set(map(float, range(5, 13)))
    graphs = data.graphs(mask, draw)
    assert not graphs[mask == 0].any()
    edges = (graphs[:, 1:, :2] - graphs[:, :-1, :2]).norm(dim=-1)[mask[:, 1:] == 1]
    assert abs(float(edges.mean()) - 0.6) < 0.02
    given = data.given(300, draw).flatten(1).mean(1)
    assert 0.02 < float(given.min()) < float(given.max()) < 0.9


def test_digits_need_scikit_learn(baseline, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    import bench.zoo._recipes

    monkeypatch.setattr(bench.zoo._recipes, "_digits", bench.zoo._recipes._digits.__wrapped__)
    assert baseline.__main__.main(["zoo", "--models", "digits", "--fit", "1", "--cache", str(tmp_path)]) == 2
    assert "pip install scikit-learn" in capsys.readouterr().err
    assert (
        baseline.__main__.main(["zoo", "--models", "policy", "--fit", "1", "--cache", str(tmp_path), "--train-only"])
        == 0
    )


def test_too_many_steps(baseline, tmp_path, capsys):
    words = ["zoo", "--models", "imputation", "--fit", "1", "--cache", str(tmp_path), "--steps", "60"]
    assert baseline.__main__.main(words) == 2
    assert "--steps: expected at most 50 for imputation, got 60" in capsys.readouterr().err


def test_a_false_promise_is_counted(zoo, member):
    """By the entries that are used, whatever the others make of the norm."""
    found, net = member("graph")
    args = argparse.Namespace(device="cpu", tol=None)
    measure = sys.modules["bench.zoo._measure"]
    with torch.no_grad():
        case = measure.Case(args, found, net, zoo.Chain(5), 0)
    weight = case.request.weight
    share = float((case.reference * weight).norm() / case.reference.norm())
    assert share < 0.9

    def outcome(factor: float, converged: bool = True) -> dict:
        sample = case.reference * (1 + factor * weight)
        stats = dq.Stats(solver="quasi-newton", window=5, error_estimate=torch.zeros(1))
        return case.outcome(dq.Solution(sample, torch.tensor([converged]), stats))

    assert outcome(0.05)["error"] == pytest.approx(0.05, rel=1e-4)
    assert outcome(0.05)["error_of_all_entries"] == pytest.approx(0.05 * share, rel=1e-4)
    assert [outcome(0.05)["false"], outcome(0.029)["false"], outcome(0.05, False)["false"]] == [True, False, False]


def test_rounds_until_the_error_stays_within(zoo):
    reached = sys.modules["bench.zoo._measure"].reached
    assert reached([0.5, 0.04, 0.06, 0.03, 0.002], 0.05) == 4
    assert reached([0.5, 0.04, 0.06, 0.03, 0.002], 1e-3) == float("inf")
    assert reached([float("nan"), 0.0], 1e-2) == 2


def test_a_solve_that_ends_too_early_is_counted_in_a_tighter_one(zoo, member):
    measure = sys.modules["bench.zoo._measure"]
    found, net = member("signal")

    class Early(measure.Case):
        def sampler(self, **settings):
            return super().sampler(**({} if "tol" in settings else {"max_rounds": 1, "on_failure": "warn"}), **settings)

    args = argparse.Namespace(device="cpu", tol=None)
    with torch.no_grad():
        whole = measure.rounds(measure.Case(args, found, net, zoo.Chain(20), 0))
        with pytest.warns(dq.ConvergenceWarning):
            early = measure.rounds(Early(args, found, net, zoo.Chain(20), 0))
    assert (early["rounds"], early["converged"], early["by_tight"]) == (1, False, [True, True])
    assert early["error"] > 5e-2
    assert early["rounds_to"][0] >= early["rounds_to"][1] > 1
    assert whole["by_tight"] == [False, False]
    assert whole["error"] <= 1e-2


def test_a_row_is_timed_within_its_budget(figures, tmp_path):
    words = ("--fit", "1", "--steps", "5", "--noises", "3", "--passes", "1", "--cache", tmp_path / "cache")
    report, table = figures("zoo", "--models", "policy", *words, "--budget", "1e-9")
    for row in report["rows"]:
        assert [len(run["planned"]["ratios"]) for run in row["runs"]] == [1, 0, 0]
        assert all(run["planned"]["error"] <= 1e-2 for run in row["runs"])
    assert "of 6 |" in table


def test_the_table_has_estimates_where_there_are_some(zoo):
    plan = {"loop_seconds": [0.2], "sample_seconds": [0.1], "ratios": [2.0], "serial_share": 0.0, "false": False}
    solve = {"rounds_to": [3.0, float("inf")], "by_tight": [False, True], "rounds": 5, "evaluations": 20, "error": 4e-3}

    def lines(estimate: float | None) -> tuple[list[str], list[str]]:
        run = {"solve": solve | {"estimate": estimate, "false": True}, "planned": plan}
        head, _, line = zoo.table([{"model": "graph", "steps": 10, "eta": 0.0, "runs": [run]}]).splitlines()
        return tuple([cell.strip() for cell in text.strip("| ").split("|")] for text in (head, line))

    head, line = lines(None)
    assert "estimate" not in head
    expected = ["graph", "10", "0", "3", "never*", "5", "2.00", "4.0e-03", "200 ms", "100 ms", "2.00 (2.00..2.00)"]
    assert line == [*expected, "0%", "1 of 2"]
    head, line = lines(6e-3)
    assert line[head.index("estimate")] == "6.0e-03"
