"""The process in which environments run, started by :mod:`pipelines.robot.processes`.

It lives as long as the run and answers one message after the other; the first builds the environments. A mistake of the
user's is answered by its sentence. When an environment fails, its sentence is the last thing that is said, since what
the failure left behind is not to be trusted.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from mmrl.errors import UserError
from pipelines.robot.senses import EnvFault
from pipelines.robot.singles import SingleEnvs
from pipelines.robot.stepping import run_chunk
from pipelines.robot.wire import receive, send

Reply = tuple[dict[str, Any], dict[str, np.ndarray]]


def main(descriptor: int) -> None:
    """Answer on the socket ``descriptor`` until the other side hangs up, then end the process."""
    _serve(Connection(descriptor))
    # Simulators that draw complain when they are taken apart in the order that Python happens to choose.
    sys.stderr.flush()
    os._exit(0)


def _serve(pipe: Connection) -> None:
    envs: SingleEnvs | None = None
    while True:
        try:
            words, arrays = receive(pipe)
            try:
                if envs is None:
                    envs = SingleEnvs(words["spec"], words["names"], **words["options"])
                    reply = {"layout": asdict(envs.layout)}, {}
                else:
                    reply = _answer(envs, words, arrays)
            except EnvFault as fault:
                send(pipe, {"fault": str(fault)})
                return
            except UserError as error:
                reply = {"error": str(error)}, {}
            send(pipe, *reply)
        except (EOFError, OSError):
            return


def _answer(envs: SingleEnvs, words: dict[str, Any], arrays: dict[str, np.ndarray]) -> Reply:
    rows = arrays["rows"]
    if words["verb"] == "draw":
        return {}, {"picture": envs.draw(rows)}
    out: dict[str, np.ndarray] = {}
    if words["verb"] == "restart":
        envs.restart(rows, words["seeds"])
    else:
        chunk = vars(run_chunk(envs, rows, arrays["actions"]))
        out = {f"info/{name}": values for name, values in chunk.pop("info").items()}
        out.update({f"chunk/{name}": values for name, values in chunk.items()})
    seen = envs.observe(rows)
    texts = {"instruction": seen.pop("instruction")} if "instruction" in seen else {}
    return texts, {**out, **{f"seen/{name}": values for name, values in seen.items()}}
