"""`flowtrain explore`."""

import os
import sys
from typing import Annotated

import typer

from flowtrain.cli.base import DataOptions, command, on_one_process

EPILOG = "Example: [cyan]flowtrain explore glow_digits[/cyan]"


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, rich_help_panel="Draw and edit")(explore)


@command
@on_one_process
def explore(
    port: Annotated[
        int, typer.Option(min=0, max=65535, show_default="a free one", help="Port.")
    ] = 0,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at. Requests need the printed token, and are plain HTTP."
        ),
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    max_memory: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            min=1,
            help="Most memory for a request.",
            show_default="a quarter of the machine's memory",
        ),
    ] = None,
    *,
    options: DataOptions,
) -> None:
    """Explore a trained model of images in the browser: samples, latents, paths, likelihoods.

    The page is served from this machine and needs no network. Images dropped onto it stay on this
    machine. Ctrl-C stops it. The command needs the extra explore.
    """
    import secrets
    import socket
    import threading
    import webbrowser

    from flowtrain.system import capacity, packages
    from flowtrain.system.console import console

    try:
        from flowtrain.tools.explore import server
    except ImportError:
        raise packages.missing("explore", "starlette", "uvicorn", extra="explore") from None
    from flowtrain.tools.explore.session import Session
    from flowtrain.tools.explore.worker import Worker

    loaded = options.load_model()
    word = str(options.model or loaded.checkpoint.path)
    memory = capacity.total() // 4 if max_memory is None else max_memory * 2**20
    words = [] if options.weights is None else ["--weights", options.weights]
    words += ["--trust-code"] if options.trust_code else []
    session = Session(loaded, word, lambda: options.data(loaded), memory, words)
    if options.words():  # the page works without data, but these were requested
        options.data(loaded).require(
            loaded.flow.shape, loaded.flow.num_bins, loaded.checkpoint.path
        )
    at = server.listening(host, port)
    token = secrets.token_urlsafe(24)
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    shown = f"[{shown}]" if ":" in shown else shown
    url = f"http://{shown}:{at.getsockname()[1]}/?token={token}"
    worker = Worker(session.idle)

    def ready() -> None:
        console.print(f"{word} is at {url}\nCtrl-C stops it")
        server.read_data(session, worker, download=bool(options.words()))
        if browser and _has_a_screen():
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    try:
        server.serve(server.app(session, worker, token), at, ready, worker.stop)
    finally:
        worker.end()


def _has_a_screen() -> bool:
    """Whether a browser opens a window. A browser of text would take the terminal."""
    return sys.platform != "linux" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
