"""Launch shapes: the table, files of them, and the tool that writes one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deqdiff_fast.kernels import _config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(_config, "TABLE", dict(_config.TABLE))


def test_what_is_saved_is_loaded(tmp_path):
    file = tmp_path / "shapes.json"
    _config.save(file, {"sm_90": {"ddim_update": _config.Config(4, 8)}})
    before = dict(_config.TABLE["sm_90"])
    _config.load(file)
    assert _config.TABLE["sm_90"] == before | {"ddim_update": _config.Config(4, 8)}
    assert _config.TABLE["sm_80"] == before


@pytest.mark.parametrize(
    "text", ['{"sm_1": {"ddim_update": {"accesses": 1}}}', '{"sm_90": {"unheard of": {"accesses": 1}}}']
)
def test_what_is_unknown_is_refused(tmp_path, text):
    (tmp_path / "shapes.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected architectures sm_80, .* and kernels ddim_update"):
        _config.load(tmp_path / "shapes.json")


@pytest.mark.skipif(not (ROOT / "bench" / "_tune.py").is_file(), reason="bench/ is not beside the tests")
def test_tuning_writes_a_file_that_a_solver_reads(tmp_path):
    """Interpreted on the CPU: the figures mean nothing, the file does."""
    pytest.importorskip("triton")
    file = tmp_path / "tuned.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = ["--tune", str(file), "--shape", "1,4,24,2", "--passes", "1", "--seconds", "0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "gpu", *words], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter is older than this NumPy; update triton")
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(file.read_text(encoding="utf-8"))
    assert set(written["cpu"]) == set(_config.DEFAULT)
    assert "ddim_update" in done.stdout
    show = "print(c.config('ddim_update', torch.device('cpu')))"
    code = f"from deqdiff_fast.kernels import _config as c; import torch; {show}"
    read = subprocess.run(
        [sys.executable, "-c", code], env=environment | {_config.ENVIRONMENT: str(file)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert read.stdout.strip() == str(_config.Config(**written["cpu"]["ddim_update"]))
