"""Whether rounds pay, in one sentence: by `info` from a measurement, in the log when a model was measured."""

from __future__ import annotations

import logging
import re

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast import info
from deqdiff_fast.planner import outlook, planner


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (
            {1: 1.0, 8: 1.0, 32: 1.1},
            r"^rounds pay for a small network on cuda:0: 32 rows in a call cost 1\.1 times one; 100 timesteps, 1 "
            r"sample: all 100 timesteps at a time, .*, since it is predicted to be \S+ times as fast as the serial "
            r"chain\.$",
        ),
        (
            {1: 1.0, 8: 8.0, 32: 32.0},
            r"^rounds do not pay for a small network on cuda:0: 32 rows in a call cost 32\.0 times one; .*: serial "
            r"chain, since the best solve would take 1\.\d\d times as long as the serial chain\.$",
        ),
    ],
)
def test_the_sentence_is_what_was_measured(monkeypatch, seconds, said):
    monkeypatch.setattr(outlook, "_measure", lambda device: seconds)
    assert re.search(said, outlook.whether_rounds_pay("cuda:0"))


def test_it_is_measured_on_this_device():
    """Random numbers of torch stay as they are."""
    state = torch.random.get_rng_state()
    assert re.match(
        r"rounds (do not )?pay for a small network on cpu, \d+ threads?: 32 rows", outlook.whether_rounds_pay("cpu")
    )
    assert torch.equal(state, torch.random.get_rng_state())


def test_info_says_it_last_and_goes_on_where_it_cannot(monkeypatch, capsys):
    assert info.main([]) == 0
    assert re.match(r"rounds (do not )?pay for a small network", capsys.readouterr().out.strip().splitlines()[-1])

    def broken(device):
        raise RuntimeError("CUDA error:\nno kernel image")

    monkeypatch.setattr(outlook, "_measure", broken)
    assert info.main([]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == "whether rounds pay could not be measured: CUDA error: no kernel image"


def test_the_log_says_it_once_a_model_was_measured(ddim, noise, caplog, bent, monkeypatch):
    made, decide = [], planner.decide
    monkeypatch.setattr(planner, "decide", lambda *args: made.append(decide(*args)) or made[-1])
    sampler = dq.DEQSampler(bent().requires_grad_(False), ddim(20))
    with caplog.at_level(logging.INFO, "deqdiff_fast"):
        assert sampler.warmup((6,), dtype=torch.float64) is not None
        for seed in range(3):
            sampler.sample(noise(1, (6,), seed, torch.float64))
    said = [message for message in caplog.messages if message.startswith("20 timesteps, 1 sample: ")]
    assert said
    assert re.fullmatch(r"20 timesteps, 1 sample: .*, since .*\.", said[0])
    assert set(said) <= {plan.summary for plan in made}
    decisions = [": serial chain," in message for message in said]
    assert all(a != b for a, b in zip(decisions, decisions[1:])), "said only where it has changed"  # noqa: RUF007
