"""Every logged key, once; units are in the key."""

from __future__ import annotations

TRAIN_LOSS = "train/loss"
TRAIN_LABEL_TOKENS = "train/label_tokens_per_step"
SKIPPED_STEPS = "train/skipped_steps"
NUM_EXITS_ON = "train/num_exits_on"
DROPOUT_MEAN_RATE = "train/dropout_rate/mean"
DROPOUT_LAST_RATE = "train/dropout_rate/last_layer"
VAL_LOSS = "val/loss"
TEST_LOSS = "test/loss"

TOKENS_PER_SECOND = "throughput/tokens_per_second"
DATA_WAIT_SHARE = "throughput/data_wait_share"  # of the time from one micro-batch to the next
BLOCKS_SAVED_SHARE = "throughput/blocks_saved_share"
BLOCKS_SKIPPED_SHARE = "throughput/blocks_skipped_share"  # nobody went through them: FSDP2 gathered nothing for them
MODEL_FLOPS_UTILISATION = "throughput/model_flops_utilisation"
MEMORY_GIB = "memory/peak_gib"

DECODE_ACCEPTANCE_RATE = "decode/acceptance_rate"
DECODE_TOKENS_PER_ROUND = "decode/mean_tokens_per_round"
DECODE_AR_TOKENS_PER_SECOND = "decode/autoregressive_tokens_per_second"
DECODE_SS_TOKENS_PER_SECOND = "decode/self_speculative_tokens_per_second"
DECODE_SPEEDUP = "decode/speedup"
DECODE_IDENTICAL_SHARE = "decode/identical_share"


DATA_PADDING_SHARE = "data/padding_share"


def data_source(name: str, source: str) -> str:
    """A data/ metric of one source: token_share (delivered), epochs, skipped_records."""
    return f"data/{name}/{source}"


TRAIN_EXIT_LOSS = "train/exit_loss/"


def train_exit_loss(exit_layer: int) -> str:
    """Training loss of one exit, in nats a token; only of steps at which it is on."""
    return f"{TRAIN_EXIT_LOSS}exit_{exit_layer:02d}"


def train_exit_weight(exit_layer: int) -> str:
    """Normalised weight of one exit in this step's loss."""
    return f"train/exit_weight/exit_{exit_layer:02d}"


def exit_loss(stage: str, exit_layer: int) -> str:
    """Held-out loss of one exit, in nats a token; `stage` is val or test."""
    return f"{stage}/exit_loss/exit_{exit_layer:02d}"


def exit_perplexity(stage: str, exit_layer: int) -> str:
    """Held-out perplexity of one exit; `stage` is val or test."""
    return f"{stage}/exit_perplexity/exit_{exit_layer:02d}"


def exit_agreement(stage: str, exit_layer: int) -> str:
    """Share of held-out tokens whose top-1 prediction at this exit equals the full model's."""
    return f"{stage}/exit_agreement/exit_{exit_layer:02d}"


def source_loss(stage: str, source: str) -> str:
    """Held-out loss of the full model on one source, in nats a token."""
    return f"{stage}/loss/{source}"


def decode_setting(name: str, exit_layer: int, num_draft_tokens: int) -> str:
    """A decode/ metric of one (exit, drafts) setting."""
    return f"{name}/exit_{exit_layer:02d}_drafts_{num_draft_tokens:02d}"


def parse_figure(name: str, stage: str, exit_layer: int, num_draft_tokens: int | None = None) -> str:
    """A figure of generated semantic parses: of an exit; or of decoding timed with drafts from it, or with 0 drafts.

    `stage` is validate or test.
    """
    prefix = "test/parse" if stage == "test" else "parse"
    if num_draft_tokens is None:
        return f"{prefix}/{name}/exit_{exit_layer:02d}"
    strategy = "self_speculative" if num_draft_tokens else "autoregressive"
    return decode_setting(f"{prefix}/{strategy}/{name}", exit_layer, num_draft_tokens)
