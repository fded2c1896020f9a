"""Results with made-up figures."""

from dataclasses import replace

from app.benchmark.result import BenchmarkResult

PLAIN = BenchmarkResult(
    strategy="autoregressive", exit_layer=None, num_draft_tokens=None, n_gram_match=None, draft_policy="fixed",
    draft_vocabulary_size=None,
    tokens_per_second=20.0, seconds_per_token=0.05,
    acceptance_rate=None, mean_tokens_per_round=1.0, speedup=1.0, identical_to_autoregressive=1.0, num_differing=0,
    num_unexplained=0, largest_logit_gap=None, largest_gap_in_spacings=None, speedup_min=1.0,
    speedup_max=1.0, speedup_interval=None,
    speedup_vs_transformers=None, speedup_vs_transformers_early_exit=None, predicted_speedup=None,
    prediction_error=None, predicted_speedup_from_rounds=None, prediction_error_from_rounds=None, seconds_prefill=0.1,
    num_prompts=4, num_tokens=80, rounds=76, drafted=0, accepted=0,
    drafted_by_n_gram=0, accepted_by_n_gram=0, drafted_by_exit={}, accepted_by_exit={},
    reached_by_position=[], accepted_by_position=[],
    acceptance_by_position=[], fell_back_share=0.0,
)  # fmt: skip
DRAFTS = replace(
    PLAIN, strategy="self_speculative", exit_layer=2, num_draft_tokens=3, speedup=1.5, acceptance_rate=0.75,
    predicted_speedup=1.65, prediction_error=0.1, reached_by_position=[10, 8, 6], accepted_by_position=[8, 6, 3],
    drafted=40, acceptance_by_position=[0.8, 0.75, 0.5],
    speedup_max=1.75, speedup_interval=(1.25, 1.8),
)  # fmt: skip
