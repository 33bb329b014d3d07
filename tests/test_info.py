"""`python -m deqdiff_fast.info`: what it says is what is there."""

from __future__ import annotations

import json

import torch

import deqdiff_fast as dq
from deqdiff_fast import info
from deqdiff_fast.kernels import available_backends
from deqdiff_fast.memory import default_memory


def test_versions_devices_and_reasons():
    facts = info.collect()
    # torch adds the build, such as +cu130, which the metadata of its wheels may leave out
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["versions"]["k-diffusion"]
    assert set(facts["backends"]) == {"reference", "cpp", "triton"}
    assert facts["backends"] == available_backends()
    assert facts["backends"]["reference"] == "available"
    if not torch.cuda.is_available():
        assert "CUDA" in facts["devices"]["cuda"] or "no device" in facts["devices"]["cuda"]
    json.dumps(facts)
    text = info.render(facts)
    for title, value in facts.items():
        for key in value if isinstance(value, dict) else ():
            assert key in text, (title, key)


def test_arena_sizes_follow_a_solve(mixture, ddim, noise):
    dq.DEQSampler(mixture(), ddim(10), solver="picard").sample(noise(1))
    memory = info.collect()["memory"]
    assert memory == {**default_memory().stats(), "byte_budget": memory["byte_budget"]}
    assert memory["high_water"] >= 10 * noise(1).numel() * 4
    assert 0 <= memory["idle_bytes"] <= memory["byte_budget"]


def test_cache_sizes(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.cubin").write_bytes(b"x" * 100)
    (tmp_path / "two.json").write_bytes(b"x" * 23)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing"))
    caches = info.collect()["caches"]
    assert caches["triton"] == f"123 bytes in 2 files ({tmp_path})"
    assert caches["torch.compile"] == f"empty ({tmp_path / 'nothing'})"
