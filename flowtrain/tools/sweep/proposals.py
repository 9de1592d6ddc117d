"""Rows that Optuna proposes. Its storage is the file `optuna.sqlite3` of the sweep."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flowtrain.errors import UserError
from flowtrain.system.files import append_regular, lock
from flowtrain.system.packages import required
from flowtrain.tools.sweep.plan import Plan, row_of


class Proposals:
    """The rows of `Plan.ranges`, proposed by the tree-structured Parzen estimator (Bergstra et al.
    2011) from the losses at the end of the first rung.

    One process at a time opens the storage, so it may lie on a shared file system. A proposal is a
    function of its number and the losses so far, so it is the same after a kill.

    Raises `UserError` if Optuna is missing, or refuses a range.
    """

    def __init__(self, folder: Path, plan: Plan):
        self.folder, self.plan = folder.absolute(), plan
        self.optuna = required("ranges", "optuna", (4, 0), "sweep")
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        self.distributions = {key: self._distribution(key) for key in plan.ranges}

    def _distribution(self, key: str) -> Any:
        values, of = self.plan.ranges[key], self.optuna.distributions
        if isinstance(values, list):
            return of.CategoricalDistribution(values)
        whole = {type(values.get(end)) for end in ("low", "high")} == {int}
        try:
            return (of.IntDistribution if whole else of.FloatDistribution)(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"ranges: {key}: {error}") from error

    @contextlib.contextmanager
    def _study(self) -> Iterator[Any]:
        storage = f"sqlite:///{self.folder / 'optuna.sqlite3'}"
        with append_regular(self.folder / ".lock") as file:
            lock(file.fileno())
            yield self.optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)

    def rows(self) -> list[str]:
        with self._study() as study:
            return [row_of({key: x.params[key] for key in self.plan.ranges}) for x in study.trials]

    def tell(self, loss: Callable[[int], float | None]) -> bool:
        """Tells Optuna the losses of its rows: None so far, infinite if one ended early. Returns
        whether it then proposed a row, because there are fewer than `Plan.trials`.
        """
        of = self.optuna.trial
        with self._study() as study:
            for each in study.get_trials(states=[of.TrialState.RUNNING]):
                if (value := loss(len(self.plan.rows) + each.number)) == math.inf:
                    study.tell(each.number, state=of.TrialState.FAIL)
                elif value is not None:
                    study.tell(each.number, value)
            number = len(study.trials)
            if number >= self.plan.trials:
                return False
            # Proposed in memory, and then stored with all its values in one transaction.
            memory = self.optuna.create_study(sampler=self.optuna.samplers.TPESampler(seed=number))
            memory.add_trials(study.trials)
            new = {"params": memory.ask(self.distributions).params, "state": of.TrialState.RUNNING}
            study.add_trial(of.create_trial(distributions=self.distributions, **new))
            return True
