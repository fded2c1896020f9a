"""Lightning callbacks, one a file."""

from callbacks.data_monitor import DataMonitor
from callbacks.dropout_agreement import DropoutAgreementCheck
from callbacks.early_exit_curriculum import EarlyExitCurriculum
from callbacks.exit_quality_monitor import ExitQualityMonitor
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.layer_dropout_curriculum import LayerDropoutCurriculum
from callbacks.parse_validation import ParseValidation
from callbacks.prediction_writer import PredictionWriter
from callbacks.preemption import Preemption
from callbacks.progress_bar import LayerSkipProgressBar
from callbacks.run_logs import RunLogs
from callbacks.self_speculative_validation import SelfSpeculativeValidation
from callbacks.task_evaluation import TaskEvaluation
from callbacks.throughput_monitor import ThroughputMonitor

__all__ = [
    "DataMonitor",
    "DropoutAgreementCheck",
    "EarlyExitCurriculum",
    "ExitQualityMonitor",
    "LastCheckpoint",
    "LayerDropoutCurriculum",
    "LayerSkipProgressBar",
    "ParseValidation",
    "PredictionWriter",
    "Preemption",
    "RunLogs",
    "SelfSpeculativeValidation",
    "TaskEvaluation",
    "ThroughputMonitor",
]
