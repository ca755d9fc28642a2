"""The service: load a merged model and answer questions over HTTP."""

from __future__ import annotations

import ipaddress
import os
import sys

from components.common.errors import run_command
from components.serve.config import ServeSettings


def main(argv: list[str] | None = None) -> int | None:
    """Serve until SIGTERM or SIGINT."""
    settings, _ = ServeSettings.parse("python -m components.serve", argv)

    from components.serve.app import create_app
    from components.serve.logs import open_log
    from components.serve.runtime import slow_work_goes_on
    from components.serve.server import Server, bind, ignore_sigterm_afterwards

    open_log(settings.log_file)
    listener = bind(settings.host, settings.port)
    port = listener.getsockname()[1]
    if not _is_loopback(settings.host):
        print(f"warning: anyone who reaches {settings.host}:{port} can ask and reload; this version has no authentication", file=sys.stderr)
    print(f"listening on http://{settings.host}:{port}, documentation at /docs; loading {settings.model_uri}", flush=True)

    app = create_app(settings)
    server = Server(app, settings)
    ignore_sigterm_afterwards()
    server.run(sockets=[listener])

    load_error: Exception | None = app.state.runtime.load_error
    if load_error is not None:
        raise load_error
    if slow_work_goes_on():
        os._exit(0)  # told to end while a model was being loaded: Python's own end could crash in the loader's native code
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_command(main)
