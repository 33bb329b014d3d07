"""The command line, on a tiny random network saved as a diffusers pipeline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import deqdiff_fast
from deqdiff_fast.cli import _images, _run, main
from deqdiff_fast.integrations.diffusers import bundled_model, ddim_schedule, load_model
from deqdiff_fast.solver import NAMED

SIZE = 8


def tiny_unet(**changes):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        **{
            "sample_size": SIZE, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False,
        } | changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    diffusers.DDIMPipeline(tiny_unet(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def sample(pipeline, tmp_path, monkeypatch):
    """Run `deqdiff-fast sample` on the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> int:
        return main(["sample", "--model", str(pipeline), "--steps", "10", "--batch", "4", *options])

    return run


def one_line(capsys) -> str:
    """The error message: one line, and nothing on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


def test_sample_writes_a_grid(sample, tmp_path, capsys):
    assert sample("--out", "deep/er/x.png", "--solver", "quasi-newton") == 0
    picture = Image.open(tmp_path / "deep" / "er" / "x.png")
    assert picture.size == (2 * 96, 2 * 96)
    captured = capsys.readouterr()
    assert re.search(r"4 images, 10 timesteps, solver \S+, window \d+: \d+ rounds, \d+ model evaluations", captured.out)
    assert re.search(r"40/40.*round \d+/\d+, converged 4/4, residual \d", captured.err), "the progress bar"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_compare_serial_and_plot(sample, tmp_path, capsys):
    assert sample("--compare-serial", "--plot", "p.png", "--out", "x.png", "--solver", "picard", "--tol", "1e-3") == 0
    found = re.search(r"largest relative error (\S+), largest pixel difference (\d+)/255", capsys.readouterr().out)
    assert float(found[1]) < 1e-2
    assert int(found[2]) <= 2
    panels = np.asarray(Image.open(tmp_path / "x.png"))
    assert panels.shape == (192 + 20 + 16, 3 * 192 + 4 * 8, 3)
    serial, parallel, difference = (panels[28:-8, 8 + k * 200 : 200 + k * 200].astype(int) for k in range(3))
    assert abs(serial - parallel).max() == int(found[2])
    assert (difference == np.minimum(255, 16 * abs(serial - parallel))).all()
    assert Image.open(tmp_path / "p.png").size[0] > 500


def test_matches_diffusers_own_ddim(pipeline, tmp_path, monkeypatch):
    """What the command writes is what the diffusers pipeline draws from the same noise."""
    monkeypatch.chdir(tmp_path)
    assert (
        main(["sample", "--model", str(pipeline), "--steps", "10", "--batch", "1", "--seed", "3", "--tol", "1e-4"]) == 0
    )
    loaded = load_model(pipeline)
    problem = _run.Problem(
        loaded.model, ddim_schedule(loaded.scheduler, 10), loaded.info, 3, torch.device("cpu"), torch.float32
    )
    x, scheduler = problem.noise(1)[0], loaded.scheduler
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(loaded.model(x, t).sample, t, x).prev_sample
    drawn = np.asarray(Image.open(tmp_path / "samples.png")).reshape(SIZE, 12, SIZE, 12, 3)[:, 0, :, 0]
    assert abs(drawn.astype(int) - _images.pixels(x)[0].numpy().astype(int)).max() <= 1


def test_seeds(sample, tmp_path):
    for name, options in {
        "a": ("--seed", "1"),
        "again": ("--seed", "1"),
        "other": ("--seed", "2"),
        "one": ("--seed", "1", "--batch", "1"),
        "noisy": ("--seed", "1", "--eta", "1"),
    }.items():
        assert sample("--out", f"{name}.png", "--tol", "1e-4", *options) == 0
    pixels = {path.stem: np.asarray(Image.open(path)).astype(int) for path in tmp_path.glob("*.png")}
    assert (pixels["a"] == pixels["again"]).all()
    assert abs(pixels["a"] - pixels["other"]).max() > 8
    assert abs(pixels["a"] - pixels["noisy"]).max() > 8
    assert abs(pixels["a"][:96, :96] - pixels["one"]).max() <= 1, "image k does not depend on the batch"


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quad"])
def test_eta_and_spacings_equal_the_serial_chain(sample, capsys, spacing):
    assert sample("--eta", "0.5", "--spacing", spacing, "--compare-serial", "--window", "6", "--max-batch", "7") == 0
    assert float(re.search(r"relative error (\S+),", capsys.readouterr().out)[1]) <= 1e-2


def test_rounds_run_out_is_said(sample, capsys):
    assert sample("--solver", "quasi-newton", "--max-rounds", "2", "--compare-serial") == 0
    out = capsys.readouterr().out
    assert re.search(r"the rounds ran out and \d+ steps were finished serially", out)
    assert float(re.search(r"relative error (\S+),", out)[1]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps: expected a whole number >= 1, got '0'"),
        (("--steps", "1.5"), "expected a whole number"),
        (("--batch", "-1"), "expected a whole number"),
        (("--eta", "1.5"), "expected a number from 0 to 1"),
        (("--eta", "nan"), "expected a number from 0 to 1"),
        (("--tol", "0"), "expected a number > 0"),
        (("--tol", "small"), "expected a number, got 'small'"),
        (("--window", "0"), "expected a whole number"),
        (("--preset", "mnist"), "choose from"),
        (("--solver", "newton"), "choose from"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_options_are_refused_in_one_line(sample, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        sample(*options)
    assert stop.value.code == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "x.jpg"), "name a file that ends in .png"),
        (("--out", "taken"), "name a file that ends in .png"),
        (("--out", "folder.png"), "that is a folder"),
        (("--plot", "x.svg"), "name a file that ends in .png"),
        (("--plot", "samples.png"), "name two files"),
        (("--out", "file/x.png"), "cannot write in file"),
        (("--out", "/proc/x.png"), "cannot write in /proc"),
        (("--device", "cuda:99"), "not usable here"),
        (("--device", "abacus"), "not usable here"),
    ],
)
def test_refused_before_the_model_is_loaded(sample, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(_run, "load_model", lambda *args, **kwargs: pytest.fail("work was done first"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept")
    assert sample(*options) == 2
    assert message in one_line(capsys)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failing_run_keeps_the_old_picture(sample, tmp_path, monkeypatch, capsys):
    assert sample("--out", "x.png") == 0
    before = (tmp_path / "x.png").read_bytes()
    capsys.readouterr()

    def broken(picture, path):
        path.write_bytes(b"half a pict")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", broken)
    assert sample("--out", "x.png", "--seed", "5") == 2
    assert "no space left on device" in capsys.readouterr().err
    assert (tmp_path / "x.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_interrupt(sample, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_run, "load_model", interrupted)
    assert sample() == 130
    assert one_line(capsys) == "deqdiff-fast: interrupted"


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
