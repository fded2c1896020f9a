import json

import pytest

from app.cli.adapt_settings import AdaptSettings
from app.cli.adaptation import Adaptation


@pytest.mark.parametrize(("policy", "exits"), [("fixed", [1]), ("adaptive", [1]), ("dynamic", [1, 3])])
def test_what_tune_chose_is_measured_from_the_exits_that_its_policy_takes(tmp_path, monkeypatch, policy, exits):
    tuned = {"strategy": "self_speculative", "exit_layer": 1, "num_draft_tokens": 2, "n_gram_match": None}
    stored = {"layerskip": {**tuned, "draft_policy": policy, "draft_exits": [3]}}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    asked = {}

    def run(_, step, verb, options):
        asked.update(options)
        (tmp_path / "benchmark.json").write_text('{"results": []}')

    monkeypatch.setattr(Adaptation, "_run", run)
    monkeypatch.setattr(Adaptation, "_prompts", ("learn", "tune", "measure"))
    own = Adaptation(
        model="m", output_dir=str(tmp_path), folder=tmp_path, settings=AdaptSettings(corpus="c"), exit_layer=1
    )
    assert own.measure() == []
    assert json.loads(asked["exit_layers"]) == exits
    assert (asked["draft_policy"], asked["prompts"]) == (policy, "measure")
    assert asked["overwrite"]  # a call that was cut off may have left the file
