"""The names of all logged metrics, with their units. Tested by tests/integration/test_monitors.py."""

TRAIN_LOSS = "train/loss"
TRAIN_LABEL_TOKENS = "train/label_tokens_per_step"
TRAIN_EXIT_LOSS = "train/exit_loss"  # by exit, in nats a token; only of steps at which the exit is on
TRAIN_EXIT_WEIGHT = "train/exit_weight"  # by exit, as normalised in the loss of the step
SKIPPED_STEPS = "train/skipped_steps"
NUM_EXITS_ON = "train/num_exits_on"
DROPOUT_RATE = "train/dropout_rate"  # by block
DROPOUT_MEAN_RATE = "train/dropout_rate/mean"
DROPOUT_LAST_RATE = "train/dropout_rate/last_layer"
GRADIENT_NORM = "train/gradient_norm"  # by block, before clipping
GRADIENT_NORM_WHOLE = "train/gradient_norm/whole"

# Of held-out rows, all but the first two by exit and below the stage, val or test.
VAL_LOSS = "val/loss"
TEST_LOSS = "test/loss"
EXIT_LOSS = "exit_loss"  # in nats a token
EXIT_PERPLEXITY = "exit_perplexity"
EXIT_AGREEMENT = "exit_agreement"  # share of tokens whose most probable token is the full model's
EXIT_KL = "exit_kl"  # of the full model's distribution from the exit's, in nats a token
EXIT_ACCEPTANCE = "exit_acceptance"  # 1 - TV: the chance that a token sampled from the exit is accepted
EXIT_PREDICTED_SPEEDUP = "exit_predicted_speedup"  # of greedy decoding, at the best number of drafts

TOKENS_PER_SECOND = "throughput/tokens_per_second"
DATA_WAIT_SHARE = "throughput/data_wait_share"  # of the time from one micro-batch to the next
BLOCKS_SAVED_SHARE = "throughput/blocks_saved_share"
BLOCKS_SKIPPED_SHARE = "throughput/blocks_skipped_share"  # blocks that no sample of any rank entered
MODEL_FLOPS_UTILISATION = "throughput/model_flops_utilisation"
MEMORY_GIB = "memory/peak_gib"

DECODE_ACCEPTANCE_RATE = "decode/acceptance_rate"
DECODE_TOKENS_PER_ROUND = "decode/mean_tokens_per_round"
DECODE_AR_TOKENS_PER_SECOND = "decode/autoregressive_tokens_per_second"
DECODE_SS_TOKENS_PER_SECOND = "decode/self_speculative_tokens_per_second"
DECODE_SPEEDUP = "decode/speedup"
DECODE_IDENTICAL_SHARE = "decode/identical_share"

DRAFTED = "_self_speculative"  # ends the name of a task's figure that is the full model's with drafts from the exit

DATA_PADDING_SHARE = "throughput/padding_share"


def data_source(name: str, source: str) -> str:
    """A metric of one source of data: token_share (delivered), epochs, skipped_records."""
    return f"source/{name}/{source}"


def of_exit(name: str, exit_layer: int) -> str:
    """A metric of one exit."""
    return f"{name}/exit_{exit_layer:02d}"


def of_block(name: str, block: int) -> str:
    """A metric of one block, counted from 1: the last one of the exit of this number."""
    return f"{name}/block_{block:02d}"


def source_loss(stage: str, source: str) -> str:
    """Held-out loss of the full model on one source, in nats a token."""
    return f"{stage}/loss/{source}"


def decode_setting(name: str, exit_layer: int, num_draft_tokens: int) -> str:
    """A decode/ metric of one (exit, drafts) setting."""
    return f"{name}/exit_{exit_layer:02d}_drafts_{num_draft_tokens:02d}"


def parse_figure(name: str, stage: str, exit_layer: int, num_draft_tokens: int | None = None) -> str:
    """A figure of parses in stage validate or test: of an exit, or of timed decoding with so many drafts from it."""
    prefix = "test/parse" if stage == "test" else "parse"
    if num_draft_tokens is None:
        return of_exit(f"{prefix}/{name}", exit_layer)
    strategy = "self_speculative" if num_draft_tokens else "autoregressive"
    return decode_setting(f"{prefix}/{strategy}/{name}", exit_layer, num_draft_tokens)


def task_score(stage: str, column: str, metric: str, exit_layer: int, *, drafts: bool = False) -> str:
    """A score of a task of evaluation at an exit, or of the full model with drafts from it; `stage` is val or test."""
    return of_exit(f"{stage}/task/{column}/{metric}{DRAFTED if drafts else ''}", exit_layer)
