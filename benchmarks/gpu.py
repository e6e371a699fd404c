"""``make gpu``: build, test and measure on a GPU, in stages that lose nothing.

Every stage leaves a log and, once done, a mark in the output folder, so that the next call goes on
where this one stopped; a stage that fails does not keep the rest from running, and is tried again.
A call ends after ``--minutes`` and says whether there is more to do (exit status 3).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .gpu_stages import ROOT, Stage, stages_of

#: Exit statuses: all is done; a stage failed; time is up.
DONE, FAILED, UNFINISHED = 0, 1, 3
DEVICE_CHECK = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"gpu: torch {torch.__version__} finds no CUDA device")
"""


def run_stage(stage: Stage, output: Path, seconds: float) -> str:
    """Run one stage, its output in ``output/NAME.log``; ``"done"``, ``"failed"`` or ``"stopped"``.

    Args:
        seconds: it is stopped after these.
    """
    with (output / f"{stage.name}.log").open("ab") as log:
        try:
            # In a process group of its own, so that its compilers stop with it.
            process = subprocess.Popen(
                stage.command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )
        except OSError as error:
            log.write(f"{error}\n".encode())
            return "failed"
        try:
            return "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def last_line(log: Path) -> str:
    """Where pytest and the other stages say how it went."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run(stages: Sequence[Stage], output: Path, seconds: float) -> int:
    """Run the stages that are not done yet, for ``seconds`` at most; the exit status."""
    output.mkdir(parents=True, exist_ok=True)
    state_file = output / "stages.json"
    state: dict[str, str] = json.loads(state_file.read_text()) if state_file.exists() else {}
    # What failed waits until all others had their turn.
    waiting = [stage for stage in stages if state.get(stage.name) not in ("done", "failed")]
    waiting += [stage for stage in stages if state.get(stage.name) == "failed"]
    end = time.monotonic() + seconds
    for stage in waiting:
        left = end - time.monotonic()
        if left <= 0:
            break
        print(f"gpu: {stage.name} ...", flush=True)
        began = time.monotonic()
        state[stage.name] = run_stage(stage, output, left)
        spent = time.monotonic() - began
        said = last_line(output / f"{stage.name}.log")
        print(f"gpu: {stage.name}: {state[stage.name]} after {spent:.0f} s: {said}", flush=True)
        state_file.write_text(json.dumps(state, indent=1) + "\n")
    found = [state.get(stage.name, "not started") for stage in stages]
    failed = [stage.name for stage in stages if state.get(stage.name) == "failed"]
    if failed:
        print(f"gpu: failed, see the logs in {output}: {', '.join(failed)}")
    left_over = sum(each in ("stopped", "not started") for each in found)
    if left_over:
        print(f"gpu: time is up, {left_over} stages are left: run the same command again")
        return UNFINISHED
    return FAILED if failed else DONE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of logs and results")
    parser.add_argument("--model", type=Path, help="a small model's directory, to compress")
    parser.add_argument("--minutes", type=float, default=7.5, help="end of a call")
    parser.add_argument(
        "--skip", nargs="*", default=[], metavar="STAGE", help="stages left out, by how names begin"
    )
    parser.add_argument("--list", action="store_true", help="print the stages and end")
    options = parser.parse_args()
    output = options.output.resolve()
    model = options.model and options.model.resolve()
    stages = [
        stage
        for stage in stages_of(output, model)
        if not stage.name.startswith(tuple(options.skip))
    ]
    if options.list:
        for stage in stages:
            print(f"{stage.name}: {' '.join(map(str, stage.command))}")
        return DONE
    if subprocess.run([sys.executable, "-c", DEVICE_CHECK]).returncode:
        return FAILED
    return run(stages, output, options.minutes * 60)


if __name__ == "__main__":
    sys.exit(main())
