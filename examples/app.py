"""A page that samples a picture in rounds, then by the serial chain from the same noise; and inverts uploaded ones.

    python examples/app.py                     # then open the address that it prints
    python examples/app.py --model FOLDER      # another diffusers folder; it can be changed on the page, too

The two run one after the other, rounds first: at the same time each would slow the other down. A solve stands still
while its pictures are made and drawn, and its clock with it; so it takes longer than its clock says. The checks of a
model's first solve are counted; sample again to be without. This page shows, `deqdiff-fast bench` measures.
Visitors can have any folder opened as a model: keep the page to yourself.

The solves are in app_solves.py.

Needs: deqdiff_fast[app].
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterator

import gradio as gr
from app_solves import SOLVERS, View, compare, invert

import deqdiff_fast as dq

WRONG = (dq.DeqDiffError, ValueError, OSError, ImportError)  # what is said on the page
ABOUT = """# The whole chain at once
In rounds, then by the serial chain from the same noise. A solve stands still while its pictures are made and drawn, and
its clock with it. The serial chain's picture is what it predicts of the clean one. Solver "auto" makes rounds here,
even where the planner would take the serial chain.
"""


def build(model: str) -> gr.Blocks:
    """The page."""
    stops: dict[str, threading.Event] = {}  # of each visitor's running solve

    def views(solve: Callable[..., Iterator[View]], fields: tuple, blank: int, request: gr.Request) -> Iterator[View]:
        stop = stops[request.session_hash] = threading.Event()
        try:
            yield View("begun", (None,) * blank)
            yield from solve(*fields, stop)
        except WRONG as error:
            yield View(f"{type(error).__name__}: {error}", (None,) * blank)
        finally:
            stops.pop(request.session_hash, None)

    def on_sample(name, seed, steps, tol, solver, request: gr.Request):
        for view in views(compare, (name, seed, steps, tol, solver), 2, request):
            yield view.status, *view.pictures, gr.skip() if view.plot is None else view.plot

    def on_invert(name, steps, tol, file, scale, request: gr.Request):
        for view in views(invert, (name, steps, tol, file, scale), 3, request):
            yield view.status, *view.pictures

    def on_stop(request: gr.Request):
        if request.session_hash in stops:
            stops[request.session_hash].set()

    with gr.Blocks(title="deqdiff_fast", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            name = gr.Textbox(model, label="model: bundled, a folder or a hub name", scale=2)
            seed = gr.Number(0, label="seed", precision=0)
            steps = gr.Number(50, label="steps", precision=0)
            tol = gr.Number(1e-2, label="tolerance")
            solver = gr.Dropdown(SOLVERS, value="auto", label="solver")
        with gr.Row():
            start, end = gr.Button("Sample", variant="primary"), gr.Button("Stop", variant="stop")
        status = gr.Textbox(label="how it goes", lines=3, interactive=False)
        with gr.Row():
            left, right = gr.Image(label="rounds", format="png"), gr.Image(label="serial chain", format="png")
            plot = gr.Plot(show_label=False, format="png")
        gr.Markdown("## The noise behind a picture")
        with gr.Row():
            with gr.Column():
                file, scale = gr.File(label="picture", height=160), gr.Checkbox(label="scale it to the model's size")
                find = gr.Button("Invert")
            found = gr.Textbox(label="how the inversion goes", lines=8, interactive=False, scale=2)
        with gr.Row():
            pictures = [gr.Image(label=label, format="png") for label in ("given", "its noise", "given back")]
        quiet = {"concurrency_id": "solve", "concurrency_limit": 1, "show_progress": "hidden"}
        start.click(on_sample, [name, seed, steps, tol, solver], [status, left, right, plot], **quiet)
        find.click(on_invert, [name, steps, tol, file, scale], [found, *pictures], **quiet)
        end.click(on_stop, queue=False)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="diffusers folder or hub name")
    parser.add_argument("--port", type=int, help="default: 7860, or the next that is free")
    args = parser.parse_args()
    build(args.model).launch(server_port=args.port, ssr_mode=False, max_file_size="50mb")


if __name__ == "__main__":
    main()
