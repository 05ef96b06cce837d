"""A process that runs learning runs in children of its own, and kills them in a while, or in the middle of a call.

One JSON object a line comes in: folder, recipe, resume; and one of
    point, when, number: the call at which the child kills itself, `before`, `after`, or with half of what it writes written (`torn`);
    after_s: seconds after which it is killed; and `family`: whether all that it started is killed, too;
    file_bytes: size beyond which no file can grow, as on a full disk;
    terminate: whether SIGTERM is sent in place of SIGKILL.
One goes out: how the child ended, what it said, and how long it took.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import counting_oracle
import learning_runs
import torch

from gpmlp.cli.interrupts import terminated_as_interrupted
from gpmlp.core.errors import UserError
from gpmlp.io import archive
from gpmlp.learning import labels, loop, model, walker
from gpmlp.learning.checkpoint import RunFiles
from gpmlp.learning.label_requests import LabelRequests
from gpmlp.learning.oracles import results, worker
from gpmlp.learning.oracles.labeller import Labeller

POINTS = {
    "asking": (LabelRequests, "submit"),
    "oracle": (counting_oracle.Counting, "calculate"),
    "spool": (results, "write_record"),
    "tape": (labels, "_extend"),
    "forgetting": (Labeller, "forget"),
    "learning": (model.OnlineModel, "with_label"),
    "dynamics": (walker, "advance_walker"),
    "log": (RunFiles, "_write"),
    "model": (archive, "save"),
    "checkpoint": (RunFiles, "save_checkpoint"),
    "name": (os, "replace"),
    "disk": (os, "fsync"),
    "judging": (loop._Run, "_judge"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, when: str, number: int) -> None:
    """Replace a function by one that kills this process at its number-th call."""
    place, name = POINTS[point]
    original, calls = getattr(place, name), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and when != "after":
            if when == "torn":
                half(*args)
            die()
        found = original(*args, **kwargs)
        if len(calls) == number:
            die()
        return found

    def half(*args) -> None:
        """Half of a frame on the tape, or of a line in the log."""
        if point == "tape":
            path, text = args
            with open(path, "ab") as file:
                file.write(text[: len(text) // 2])
        else:
            trail, file, data = args
            trail._files[file].write(data[: len(data) // 2])

    setattr(place, name, deadly)


def child(request: dict, said: int) -> None:
    """Make the run, and end this process with 0 (stopped), 2 (an error of the user's) or 3 (another)."""
    os.setpgid(0, 0)
    code, text = 0, ""
    try:
        if "point" in request:
            arm(request["point"], request["when"], request["number"])
        if "file_bytes" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
        chosen = learning_runs.recipe(**request["recipe"])
        with terminated_as_interrupted():
            text = learning_runs.finish(chosen, Path(request["folder"]), request["resume"]).stopped
    except UserError as error:
        code, text = 2, str(error)
    except KeyboardInterrupt:
        code, text = 130, "interrupted"
    except BaseException as error:
        import traceback

        code, text = 3, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    os.write(said, text.encode()[:4000])
    os._exit(code)


def served(request: dict) -> dict:
    began = time.monotonic()
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        child(request, theirs)
    os.close(theirs)
    if "after_s" in request:
        end = began + request["after_s"]
        while time.monotonic() < end and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        family = worker.child_processes(pid) if request.get("family") else []
        for one in (pid, *family):
            try:
                os.kill(one, signal.SIGTERM if request.get("terminate") else signal.SIGKILL)
            except ProcessLookupError:
                pass
    _, status = os.waitpid(pid, 0)
    text = io.FileIO(ours).readall().decode(errors="replace")
    return {"code": os.waitstatus_to_exitcode(status), "text": text, "seconds": time.monotonic() - began}


def warm() -> None:
    """Make a short run here, so that what is compiled or imported on the way is there in every child."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[counting_oracle.LOG] = str(Path(folder) / "answers")
        short = {"dynamics": {"steps": 15, "ramp_steps": 10}}
        learning_runs.finish(learning_runs.recipe(**short), learning_runs.prepare(Path(folder)))


def main() -> None:
    torch.set_num_threads(1)
    warm()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request.pop("env", {}))
        answers.write(json.dumps(served(request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
