"""What in `model_kwargs` belongs to the samples, what is said to belong to none, and what is logged as a guess."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.model import sample_kwargs


@pytest.fixture(autouse=True)
def _nothing_was_told(monkeypatch):
    monkeypatch.setattr(sample_kwargs, "_told", set())


def levels_of(x, t, levels=None, nested=None):
    """A model that reads a table which belongs to no sample."""
    levels = nested["levels"] if levels is None else levels
    return 0.5 * torch.tanh(x) + levels[t % len(levels)][:, None]


def prompted(x, t, prompts):
    """A model that goes through prompts and rows together."""
    assert len(prompts) == len(x), "every row has a prompt"
    return 0.5 * torch.tanh(x) + torch.tensor([0.3 * len(prompt) for prompt in prompts])[:, None]


@pytest.mark.parametrize("gradient", [None, "implicit", "unrolled", "reversible"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_marked_table_of_as_many_rows_as_samples(ddim, noise, relative_error, gradient, nested):
    table, start = torch.tensor([0.0, 1.0, 2.0, 3.0], requires_grad=gradient is not None), noise(4, (8,))
    kwargs = {"nested": dq.shared({"levels": table})} if nested else {"levels": dq.shared(table)}
    sampler = dq.DEQSampler(levels_of, ddim(12), solver="quasi-newton", tol=1e-5, gradient=gradient or "implicit")
    out, expected = sampler.sample(start, kwargs), sampler.serial(start, kwargs)
    assert relative_error(out.sample.detach(), expected.sample).max() < 1e-4
    if gradient is not None:
        out.sample.sum().backward()
        got, own = table.grad, table.detach().clone().requires_grad_()
        x = start
        for i, t in enumerate(sampler.schedule.timesteps):
            out = levels_of(x, t.expand(4), own)
            x = float(sampler.schedule.state_coef[i, 0]) * x + float(sampler.schedule.model_coef[i, 0]) * out
        x.sum().backward()
        torch.testing.assert_close(got, own.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("gradient", [None, "implicit", "phantom", "unrolled", "reversible"])
def test_a_table_that_nobody_marked(ddim, noise, relative_error, caplog, gradient):
    """Rows that depend on each other say that it is none: what is guessed is given up, in later solves too."""
    table, start, network = torch.arange(4.0, requires_grad=gradient is not None), noise(4, (8,)), []

    def model(x, t, levels):
        network.append(len(levels))
        return levels_of(x, t, levels)

    sampler = dq.DEQSampler(model, ddim(12), solver="quasi-newton", tol=1e-5, gradient=gradient or "implicit")
    for _ in range(3):
        out, expected = (solve(start, {"levels": table}) for solve in (sampler.sample, sampler.serial))
        assert relative_error(out.sample.detach(), expected.sample).max() < 1e-4
    assert network[-1] == 4
    if gradient not in ("unrolled", "reversible"):  # which do not compare rows
        assert "not one a sample" in caplog.text
    if gradient is not None:
        out.sample.sum().backward()
        marked = table.detach().clone().requires_grad_()
        sampler.sample(start, {"levels": dq.shared(marked)}).sample.sum().backward()
        torch.testing.assert_close(table.grad, marked.grad, rtol=1e-3, atol=1e-3)


def test_rows_that_depend_on_each_other_whatever_is_guessed(ddim, noise):
    def coupled(x, t, levels):
        return 0.5 * torch.tanh(x) + t[0] / 1000 + 0.1 * levels.mean()

    with pytest.raises(dq.ModelOutputError, match="not independent"):
        dq.DEQSampler(coupled, ddim(12), solver="quasi-newton").sample(noise(4, (8,)), {"levels": torch.arange(4.0)})


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("batch", [1, 3])
def test_prompts_are_repeated_with_their_samples(ddim, noise, relative_error, container, batch):
    prompts = container(["a", "bb", "cccc"][:batch])
    sampler = dq.DEQSampler(prompted, ddim(12), solver="quasi-newton", tol=1e-5, max_batch=7)
    out, expected = (solve(noise(batch, (8,)), {"prompts": prompts}) for solve in (sampler.sample, sampler.serial))
    assert relative_error(out.sample, expected.sample).max() < 1e-4


def test_marked_strings_are_passed_on_as_they_are(ddim, noise):
    def model(x, t, names):
        assert names == ["red", "green", "blue"]
        return 0.5 * x

    dq.DEQSampler(model, ddim(5)).sample(noise(3, (8,)), {"names": dq.shared(["red", "green", "blue"])})


def test_guided_models_take_marks_and_prompts(ddim, noise, relative_error):
    def model(x, t, cond, levels, prompts):
        return prompted(x, t, prompts) + levels[t % len(levels)][:, None] + cond

    cond = torch.linspace(0, 1, 3)[:, None]
    guided, start = dq.guided(model, cond, torch.zeros(3, 1), 2.0), noise(3, (8,))
    kwargs = {"levels": dq.shared(torch.tensor([0.0, 1.0, 2.0])), "prompts": ["a", "bb", "cccc"]}
    sampler = dq.DEQSampler(guided, ddim(8), solver="quasi-newton", tol=1e-5)
    out = sampler.sample(start, kwargs).sample
    x = start
    for i, t in enumerate(sampler.schedule.timesteps):
        x = float(sampler.schedule.state_coef[i, 0]) * x + float(sampler.schedule.model_coef[i, 0]) * guided(
            x, t.expand(3), **kwargs
        )
    assert relative_error(out, x).max() < 1e-4


def test_what_belongs_to_no_sample_still_does_where_only_some_samples_are_left(ddim, noise):
    """An inversion that goes on with two of four images must not take a table of two for theirs."""
    values = {
        "row": torch.arange(4.0),
        "table": torch.arange(2.0),
        "names": ["a", "b"],
        "prompts": ["a", "b", "c", "d"],
    }
    some = sample_kwargs.select_samples(values, 4, torch.tensor([1, 3]))
    for _ in range(2):  # of these, one after the other
        for_rows = sample_kwargs.select_rows(some, 2, torch.tensor([0, 1, 0, 1, 1]))
        assert for_rows["row"].tolist() == [1, 3, 1, 3, 3]
        assert for_rows["prompts"] == ["b", "d", "b", "d", "d"]
        assert for_rows["table"].tolist() == [0, 1]
        assert for_rows["names"] == ["a", "b"]
        some = sample_kwargs.select_samples(some, 2, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(3), r"model_kwargs\['x'\]: a tensor of 3 numbers, for 3 samples, is taken for one a sample; mark"),
        (["a", "b", "c"], r"model_kwargs\['x'\]: a list of 3 strings, for 3 samples, is taken for one a sample"),
        ({"y": ("a", "b", "c")}, r"model_kwargs\['x'\]\['y'\]: a tuple of 3 strings"),
        ([1.0, 2.0, 3.0], r"a list of 3, for 3 samples, is passed on as it is, whatever rows a call has"),
        ([torch.zeros(5, 2)] * 3, r"a list of 3, for 3 samples, is passed on as it is"),
        (np.zeros((3, 2)), r"model_kwargs\['x'\]: a ndarray of 3 rows, for 3 samples, is passed on as it is, whatever"),
        ({"y": np.array(["a", "b", "c"])}, r"model_kwargs\['x'\]\['y'\]: a ndarray of 3 rows"),
        (np.zeros(4), ""),
        (dq.shared(np.zeros(3)), ""),
        (torch.zeros(3, 2), ""),
        (torch.zeros(3, dtype=torch.int64), ""),
        (torch.zeros(4), ""),
        ([torch.zeros(3, 2)] * 3, ""),
        (["a", "b"], ""),
        (dq.shared(torch.zeros(3)), ""),
        (dq.shared(["a", "b", "c"]), ""),
    ],
)
def test_a_guess_is_logged_once(ddim, noise, caplog, value, said):
    sampler, inverter = dq.DEQSampler(levels_of, ddim(4)), dq.DEQInverter(levels_of, ddim(4))
    with caplog.at_level(logging.WARNING, "deqdiff_fast"):
        for check in (sampler.options.check_request, sampler.options.check_request):
            check(noise(3, (4,)), {"x": value}, None)
        inverter._check(noise(3, (4,)), {"x": value}, None, None, None)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == bool(said)
    assert not said or re.search(said, messages[0])


def test_nothing_is_logged_for_one_sample(ddim, noise, caplog):
    dq.DEQSampler(prompted, ddim(4)).sample(noise(1, (8,)), {"prompts": ["a"]})
    assert "model_kwargs" not in caplog.text


def test_marks_are_taken_off_once():
    value = torch.zeros(3)
    assert dq.shared(dq.shared(value)).value is value


def volumes_of(x, t, volumes, sample=None):
    """A model that reads a large tensor: that of each row, or all of them with the number of each row's sample."""
    strength = volumes.flatten(1)[:, :8]
    return 0.5 * torch.tanh(x) + (strength if sample is None else strength[sample])


@pytest.mark.parametrize("solver", ["picard", "quasi-newton"])
def test_large_side_inputs_are_not_copied_for_every_timestep(ddim, noise, relative_error, peak_bytes, caplog, solver):
    volumes = torch.randn(3, 1 << 18, generator=torch.Generator().manual_seed(0))  # a megabyte each
    sampler = dq.DEQSampler(volumes_of, ddim(20), solver=solver, tol=1e-5)
    indexed = {"volumes": dq.shared(volumes), "sample": torch.arange(3)}
    with caplog.at_level(logging.INFO, "deqdiff_fast"), peak_bytes() as seen, torch.no_grad():
        found = sampler.sample(noise(3, (8,)), indexed)
    assert seen.peak < 4 * 2**20  # the three megabytes themselves are counted
    assert "volumes" not in caplog.text
    with caplog.at_level(logging.INFO, "deqdiff_fast"), peak_bytes() as seen, torch.no_grad():
        expected = [solve(noise(3, (8,)), {"volumes": volumes}) for solve in (sampler.sample, sampler.serial)]
    assert seen.peak > 10 * 2**20, "the test must be able to tell"
    assert caplog.text.count("model_kwargs['volumes']: 1.0 MB for each sample are copied for every timestep") == 1
    for one in expected:
        assert relative_error(found.sample, one.sample).max() < 1e-4


ROWS_OF_NO_SAMPLE = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(n, 2) for n in (1, 2, 3)], layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(n, 2) for n in (1, 2, 3)]),
    "mkldnn": lambda: torch.eye(3).to_mkldnn(),
}


@pytest.mark.parametrize("kind", ROWS_OF_NO_SAMPLE)
def test_tensors_whose_rows_cannot_be_taken_are_passed_on_or_refused(ddim, noise, kind):
    value, given = ROWS_OF_NO_SAMPLE[kind](), []

    def model(x, t, table):
        given.append(table["a"])
        return 0.5 * torch.tanh(x)

    sampler = dq.DEQSampler(model, ddim(8), solver="quasi-newton")
    sampler.serial(noise(3, (8,)), {"table": {"a": value}})
    sampler.sample(noise(3, (8,)), {"table": {"a": dq.shared(value)}})
    assert all(one is value for one in given)
    with pytest.raises(ValueError, match=r"model_kwargs\['table'\]\['a'\]: expected a dense tensor.*shared\("):
        sampler.sample(noise(3, (8,)), {"table": {"a": value}})
    with pytest.raises(ValueError, match=r"model_kwargs\['table'\]\['a'\]: expected a dense tensor"):
        dq.DEQInverter(model, ddim(8), "equilibrium").invert(noise(3, (8,)), {"table": {"a": value}})


def test_rows_of_unsigned_integers(ddim, noise):
    labels = torch.tensor([1, 2, 3], dtype=torch.uint16)
    seen = dq.DEQSampler(lambda x, t, k: x / (1 + k.to(x)[:, None]), ddim(8), solver="picard", tol=1e-5)
    found, expected = (solve(noise(3, (8,)), {"k": labels}).sample for solve in (seen.sample, seen.serial))
    assert torch.allclose(found, expected, atol=1e-4)
