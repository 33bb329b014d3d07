"""The models that the command line takes, and its other commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from cli_cases import SIZE, one_line, tiny_unet

import deqdiff_fast
from deqdiff_fast.cli import main
from deqdiff_fast.integrations.diffusers import bundled_model, ddim_schedule, load_model
from deqdiff_fast.solver import NAMED


def test_a_model_gone_wrong_is_one_line(pipeline, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "nan"
    model = tiny_unet()
    torch.nn.init.constant_(model.conv_out.bias, float("nan"))
    diffusers.DDIMPipeline(model, diffusers.DDIMScheduler()).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--model", str(folder), "--steps", "5", "--batch", "1"]) == 2
    assert "NaN or Inf at timestep 800" in capsys.readouterr().err.strip().splitlines()[-1]
    with pytest.raises(deqdiff_fast.NonFiniteError):
        main(["--debug", "sample", "--model", str(folder), "--steps", "5", "--batch", "1"])


def test_missing_and_unknown_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "./nowhere": "there is no such folder",
        "just-a-name": "a hub name has the form owner/name",
        "empty": "no denoiser",
    }.items():
        assert main(["sample", "--model", name]) == 2
        assert message in one_line(capsys)


def test_flat_folders_of_the_first_diffusers_releases(pipeline, tmp_path, capsys):
    flat = tmp_path / "flat"
    shutil.copytree(pipeline / "unet", flat)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", flat)
    new, old = load_model(pipeline), load_model(str(flat))
    assert old.info.sample_shape == new.info.sample_shape == (3, SIZE, SIZE)
    assert old.info.scheduler_class == "DDIMScheduler"
    assert old.info.parameters == new.info.parameters > 0
    for a, b in zip(new.model.parameters(), old.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not b.requires_grad
    (flat / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no scheduler"):
        load_model(flat)


def test_half_precision_weights_are_loaded_in_the_precision_asked_for(pipeline, tmp_path):
    half = tmp_path / "half"
    diffusers.DDIMPipeline(tiny_unet().half(), diffusers.DDIMScheduler()).save_pretrained(half)
    assert {p.dtype for p in load_model(half).model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(half, dtype=torch.float64).model.parameters()} == {torch.float64}


def test_a_conditional_model_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scheduler = diffusers.DDIMScheduler()
    diffusers.DDIMPipeline(tiny_unet(num_class_embeds=3), scheduler).save_pretrained(tmp_path / "labels")
    assert main(["sample", "--model", "labels"]) == 2
    assert "needs class_labels" in one_line(capsys)


def test_schedule_of_other_schedulers(pipeline):
    ddpm = diffusers.DDPMScheduler(clip_sample=True, variance_type="fixed_large")
    assert ddim_schedule(ddpm, 10).clip is not None, "the model's own setting"
    assert ddim_schedule(ddpm, 10, clip=False).clip is None
    with pytest.raises(ValueError, match="--no-clip"):
        ddim_schedule(ddpm, 10, spacing="quad")
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert ddim_schedule(flow, 10).prediction_type == "flow"
    with pytest.raises(ValueError, match="eta and spacing do not apply"):
        ddim_schedule(flow, 10, eta=0.5)


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for line in (
        rf"torch +{re.escape(torch.__version__.split('+')[0])}",
        r"reference +available",
        r"cpp +\S",
        r"triton +\S",
        r"high_water +\d",
    ):
        assert re.search(line, out), line


def test_bench_needs_a_checkout_and_runs_what_it_finds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "rounds"]) == 2
    assert "run this in the root of a checkout" in one_line(capsys)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "__main__.py").write_text("import sys\nprint('got', sys.argv[1:])\nsys.exit(7)\n")
    code = "import sys; from deqdiff_fast.cli import main; sys.exit(main(['bench', '--help', 'rounds', '-x']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (7, "got ['--help', 'rounds', '-x']\n")


def test_demo(pipeline, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--steps", "12", "--images", "3", "--curve-steps", "10", "--curve-images", "2"]
    assert main(["demo", "--model", str(pipeline), "--out", str(out), *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["convergence.png", "results.md", "samples.png"]
    table = (out / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    without_draft = [name for name in NAMED if name not in ("auto", "draft")]  # there is none in this folder
    assert [row[0] for row in rows[2:]] == ["serial chain", "quasi-newton", "serial chain", *without_draft]
    assert [row[1:3] for row in rows[2:]] == [["12", "3"]] * 2 + [["10", "2"]] * (1 + len(without_draft))
    assert all(float(row[6]) <= 1e-2 for row in rows[2:] if row[0] != "serial chain")
    assert table.splitlines()[2] in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2


def test_bundled_model(tmp_path, monkeypatch, capsys):
    """It comes with the package, and is sampled by default."""
    monkeypatch.chdir(tmp_path)
    folder = bundled_model()
    weights = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert weights <= 16e6
    assert main(["sample", "--steps", "4", "--batch", "1", "--compare-serial"]) == 0
    assert float(re.search(r"relative error (\S+),", capsys.readouterr().out)[1]) <= 1e-2


def test_the_command_is_installed(tmp_path):
    for command in (["-m", "deqdiff_fast.cli", "--version"], ["-m", "deqdiff_fast.info"]):
        run = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, check=True)
        assert deqdiff_fast.__version__ in run.stdout
    script = Path(sys.executable).parent / "deqdiff-fast"
    run = subprocess.run([script, "sample", "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "--compare-serial" in run.stdout


@pytest.mark.skipif(not os.environ.get("DEQDIFF_TEST_INSTALLED"), reason="only where the wheel is what is tested")
def test_the_installed_wheel_is_tested():
    assert "site-packages" in Path(deqdiff_fast.__file__).parts
    assert "site-packages" in Path(deqdiff_fast.cli.__file__).parts
