"""The work of a sweep: the next trial for each worker, until all rungs are done."""

import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import BinaryIO

import joblib
import torch

from flowtrain.system.console import console
from flowtrain.tools.sweep.plan import Plan
from flowtrain.tools.sweep.proposals import Proposals
from flowtrain.tools.sweep.trials import Trial

WAIT_SECONDS = 1.0  # before the next look at trials that other processes have
Environment = Mapping[str, str]


def environments(device: torch.device, workers: int | None) -> list[Environment]:
    """The environment of the commands of each worker: one core of the CPU, or the number in
    OMP_NUM_THREADS, or one of the GPUs.
    """
    if device.type == "cpu":
        first = os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]  # of nested regions
        threads = max(1, int(first)) if first.isdecimal() else 1
        count = workers or max(1, joblib.cpu_count() // threads)
        return [{"OMP_NUM_THREADS": str(threads)}] * count
    if device.type != "cuda" or device.index is not None:
        return [{}] * (workers or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    count = workers or len(gpus)
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]


class Sweep:
    """A sweep in its directory, and the workers of this command."""

    def __init__(
        self, folder: Path, plan: Plan, device: torch.device, workers: Sequence[Environment]
    ):
        self.folder, self.plan, self.device, self.workers = folder, plan, device, workers
        self.proposals = Proposals(folder, plan) if plan.ranges else None
        self.stopping = threading.Event()
        self.running: set[subprocess.Popen[bytes]] = set()

    def rows(self) -> list[str]:
        """The settings of each row so far: first the plan's, then the proposed ones."""
        return [*self.plan.rows, *(self.proposals.rows() if self.proposals else [])]

    def trials(self, row: int) -> list[Trial]:
        paths = [self.folder / f"{row:03}-seed{seed}" for seed in range(self.plan.seeds)]
        return [Trial(row, seed, path) for seed, path in enumerate(paths)]

    def loss(self, row: int, rung: int = 1) -> float | None:
        """The mean loss of a row at the end of a rung: None so far, infinite if it ended early."""
        losses = [x.loss for each in self.trials(row) if (x := each.result(rung))]
        if len(losses) < self.plan.seeds and math.inf not in losses:
            return None
        return statistics.fmean(losses)

    def due(self) -> tuple[int, list[Trial]] | None:
        """The first rung that is not done, and its open trials. None if all is done."""
        rows = list(range(len(self.rows())))
        for rung in range(1, len(self.plan.shares) + 1):
            losses = {row: self.loss(row, rung) for row in rows}
            missing = [row for row, loss in losses.items() if loss is None]
            if missing or (rung == 1 and len(rows) < self.plan.num_rows):
                trials = [each for row in missing for each in self.trials(row)]
                return rung, [each for each in trials if not each.result(rung)]
            ranked = sorted((x, row) for row, x in losses.items() if x is not None)
            best = ranked[: math.ceil(len(rows) / (self.plan.halving or 1))]
            rows = sorted(row for loss, row in best if loss < math.inf)
        return None

    def run(self) -> None:
        """Works until all rungs are done, by this command or by others on the same directory.

        Raises `Interrupted` after a signal that stopped a trial, which has saved its state.
        """
        with futures.ThreadPoolExecutor(len(self.workers)) as pool:
            try:
                jobs = [pool.submit(self._work, each) for each in self.workers]
                for job in futures.as_completed(jobs):
                    job.result()
            except BaseException:
                self.stopping.set()
                for process in list(self.running):
                    process.terminate()
                console.print("stopping; the same command continues from here")
                raise
        if self.proposals:
            self.proposals.tell(self.loss)

    def _work(self, environment: Environment) -> None:
        while not self.stopping.is_set() and (due := self.due()):
            rung, trials = due
            tried = any(self._try(each, rung, environment) for each in trials)
            if not tried and not (rung == 1 and self.proposals and self.proposals.tell(self.loss)):
                self.stopping.wait(WAIT_SECONDS)

    def _try(self, trial: Trial, rung: int, environment: Environment) -> bool:
        """Runs a trial to the end of a rung, unless another process does or did. Returns whether it
        ran.
        """
        with trial.claimed() as claim:
            if claim is None or trial.result(rung):
                return False
            row, share = self.rows()[trial.row], self.plan.shares[rung - 1]
            name = f"{trial.path}: {row}, seed {trial.seed}, {share:.3g} of the budget"
            console.print(name)
            settings = self.plan.settings(row, trial.seed, self.device.type == "cpu")
            config = str(self.folder / "config.yaml")

            def call(words: Sequence[str], log: BinaryIO) -> int:
                return self._call([*words, "--device", str(self.device)], log, environment, claim)

            done = trial.run(rung, ["--config", config, "--until", repr(share), *settings], call)
            console.print(f"{name}: {done.message or f'{done.loss:.4f} {done.unit}'}")
            return True

    def _call(
        self, words: Sequence[str], log: BinaryIO, environment: Environment, claim: int
    ) -> int:
        """The exit code of a command, which holds the claim of its trial as long as it runs."""
        process = subprocess.Popen(
            [sys.executable, "-m", "flowtrain", *words],
            # With the number of torchrun, the command would wait for other processes.
            env={**os.environ, **environment, "WORLD_SIZE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[claim],
        )
        self.running.add(process)
        if self.stopping.is_set():  # the others were stopped before this one was in the set
            process.terminate()
        code = process.wait()
        self.running.discard(process)
        return code
