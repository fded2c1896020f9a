"""The tasks by name. A new one is a file beside this one and a line in this table (app/README.md)."""

from app.evaluation.task import Task
from app.evaluation.tasks.arc import ARC_CHALLENGE, ARC_EASY
from app.evaluation.tasks.boolq import BOOLQ
from app.evaluation.tasks.code import HUMANEVAL, MBPP
from app.evaluation.tasks.copa import COPA
from app.evaluation.tasks.gsm8k import GSM8K
from app.evaluation.tasks.hellaswag import HELLASWAG
from app.evaluation.tasks.mmlu import MMLU
from app.evaluation.tasks.open_questions import NQ_OPEN, TRIVIAQA
from app.evaluation.tasks.openbookqa import OPENBOOKQA
from app.evaluation.tasks.piqa import PIQA
from app.evaluation.tasks.race import RACE
from app.evaluation.tasks.siqa import SIQA
from app.evaluation.tasks.summaries import CNN_DM, XSUM
from app.evaluation.tasks.texts import GUTENBERG, TEXT, WIKITEXT2
from app.evaluation.tasks.topv2 import TOPV2
from app.evaluation.tasks.winogrande import WINOGRANDE

_TASKS: tuple[Task, ...] = (
    ARC_CHALLENGE,
    ARC_EASY,
    BOOLQ,
    CNN_DM,
    COPA,
    GSM8K,
    GUTENBERG,
    HELLASWAG,
    HUMANEVAL,
    MBPP,
    MMLU,
    NQ_OPEN,
    OPENBOOKQA,
    PIQA,
    RACE,
    SIQA,
    TEXT,
    TOPV2,
    TRIVIAQA,
    WIKITEXT2,
    WINOGRANDE,
    XSUM,
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
