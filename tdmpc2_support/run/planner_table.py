"""Several planners of one agent in the same episodes: the table that is printed and written to --json.

table = PlannerTable(args, task, several=False)
for agent in table_rows(agent):                       # --planner ssr,pi --scorer model,random
    table.add_row(agent, evaluation)
table.add_measures(measures)
write_tables(args, [table])
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tdmpc2_support.data.recorded import print_measures
from tdmpc2_support.envs.tasks import task_spec
from tdmpc2_support.run.reports import Evaluation, report_video, write_results

HOW = ("planner", "scorer", "rollouts")


def table_rows(agent: Any) -> Iterator[Any]:
    """The agent of every row of a table of planners: all combinations of the names in its fields `HOW`, but for parts
    that a planner or scorer ignores."""
    seen = set()
    for planner, scorer, rollouts in itertools.product(*(getattr(agent, name).split(",") for name in HOW)):
        if planner in ("mppi", "pi"):
            scorer = rollouts = "-"
        if scorer == "random":
            rollouts = "-"
        if (planner, scorer, rollouts) not in seen:
            seen.add((planner, scorer, rollouts))
            yield dataclasses.replace(agent, planner=planner, scorer=scorer, rollouts=rollouts)


class PlannerTable:
    """The table of one task. Its head is printed at once, what is added when it comes.

    Args:
        args: has the fields checkpoint, json and seed.
        task: a name.
        several: whether there are tables of other tasks, so that this one needs a title.
    """

    def __init__(self, args: Any, task: str, several: bool):
        self.content: dict[str, Any] = {"task": task, "table": [], "held_out": {}}
        self._success = task_spec(task).success
        self._last: Evaluation | None = None
        self._film = (args.checkpoint, task if several else "")
        if several:
            print(f"\n{task}")
        rate = f"{'success':>9}" if self._success else ""
        print(f"{'planner':<10}{'scorer':<8}{'roll-outs':<11}{'return':>8} {'± std':>8}{rate}", flush=True)

    def add_row(self, agent: Any, result: Evaluation) -> None:
        """Adds the evaluation of an agent of `table_rows`."""
        returns = result.returns
        row = {name: getattr(agent, name) for name in HOW} | {"returns": returns.tolist()}
        rate = ""
        if self._success:
            rate = f"{result.successes.mean():>9.2f}"
            row["successes"] = result.successes.tolist()
        names = f"{agent.planner:<10}{agent.scorer:<8}{agent.rollouts:<11}"
        print(f"{names}{returns.mean():>8.1f} {returns.std():>8.1f}{rate}", flush=True)
        self.content["table"].append(row)
        self._last = result

    def add_measures(self, found: dict[str, Any]) -> None:
        """Adds the result of `measures` on held-out episodes."""
        print_measures(found)
        self.content["held_out"] = found

    def write_film(self) -> None:
        """Writes the film of the last row, if there is one."""
        if self._last is not None:
            checkpoint, name = self._film
            report_video(checkpoint, self._last.frames, self._last.fps, name)


def write_tables(args: Any, tables: Sequence[PlannerTable]) -> None:
    """Writes the tables of all tasks to --json, if it is given, and their films."""
    contents = [table.content for table in tables]
    if args.json:
        results = contents[0] if len(contents) == 1 else {"tasks": contents}
        results = {"checkpoint": args.checkpoint, "seed": args.seed} | results
        write_results(args.json, results)
    for table in tables:
        table.write_film()
