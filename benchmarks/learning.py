"""Training a reference model on one device, for what is to be looked at afterwards."""

import sys

from gspmd.models.tasks import Params, Task
from gspmd.models.training import Record, TrainConfig, train


def learn(task: Task, schedule: TrainConfig) -> Params:
    """The parameters after training, which tells now and then how far it is."""

    def tell(record: Record) -> None:
        if record.step % 50 == 0:
            print(f"step {record.step}/{schedule.steps}: loss {record.loss:.2f}", file=sys.stderr)

    return train(schedule, task.init, task.loss, task.batch, on_step=tell)["params"]
