"""MLflow's own server, which from one kind of request on answers nothing.

Its folder tells it: 'stall_at' holds what that request contains; it is done, and not answered. The server
writes its port into 'port', and every request that it does not answer into 'stalled'.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

folder = Path(sys.argv[1])
os.environ |= {
    "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder / 'server.db'}",
    "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
    "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
    "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
}


def stalling(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:  # noqa: ANN401
    """Answer, or do what is asked, once, and say nothing while the stall lasts."""
    from mlflow.server import app

    order, record = folder / "stall_at", folder / "stalled"
    path = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
    begun = record.exists()
    if path.endswith("/health") or not order.exists() or not (begun or order.read_text() in path):
        answer: Iterable[bytes] = app(environ, start_response)
        return answer
    with record.open("a") as file:
        file.write(path + "\n")
    answer = [] if begun else app(environ, start_response)
    while order.exists():
        time.sleep(0.02)
    return answer


if __name__ == "__main__":
    from mlflow.server import handlers
    from werkzeug.serving import make_server

    handlers.initialize_backend_stores()
    server = make_server("127.0.0.1", 0, stalling, threaded=True)
    (folder / "port").write_text(str(server.server_port))
    server.serve_forever()
