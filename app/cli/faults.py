"""What torch says when another process is slow or has died, or weights are sharded, in words of what to do."""

from __future__ import annotations

import os
import re

import torch.distributed as dist

from app.errors import causes

_RESUME = "go on from the last checkpoint, if there is one, with --ckpt_path auto"
_RULES = {
    r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (?:exited unexpectedly|is killed by signal: (.*?)\.)": (
        "data worker process {0} died ({1}); most often the machine ran out of memory (`dmesg` tells): give fewer"
        f" workers (--data.num_workers) or a machine with more, and {_RESUME}"
    ),
    r"Timed out waiting (\d+)ms for|Watchdog caught collective operation timeout.*Timeout\(ms\)=(\d+)": (
        "rank {rank} waited for another rank for {seconds:g} s, the timeout: look at the output of the others for one"
        " that is stuck or gone; if one is only slow, raise the strategy's timeout"
        f" (--trainer.strategy.init_args.timeout 1:00:00); then {_RESUME}"
    ),
    r"Operator (\S+) does not have a sharding strategy": (
        "{0} does not work on sharded weights: most often it is a fused optimizer's; give"
        " --model.optimizer.init_args.fused false, or torch.optim.AdamW"
    ),
    r"The CombinedLoader has (\d+) stateful loaders, but found (\d+) states in the checkpoint": (
        "the checkpoint's loops.fit_loop.state_dict.combined_loader: got states of {1} data loaders, allowed those of"
        " the {0} that the datamodule has; use an earlier one"
    ),
    r"Connection (?:closed|reset) by peer|Broken pipe|Socket closed": (
        f"rank {{rank}} lost another rank, which died: its own output says why; mend that, and {_RESUME}"
    ),
}


def fault_message(error: BaseException) -> str | None:
    """The message for an error of torch's that is another process's or the config's fault, or None if it is not.

    Args:
        error: What ended the run; others that it was raised from count as well.
    """
    for cause in causes(error):
        for pattern, message in _RULES.items() if isinstance(cause, RuntimeError) else ():
            if found := re.search(pattern, str(cause), re.DOTALL):
                given = [group for group in found.groups() if group]
                seconds = int(given[0]) / 1000 if given and given[0].isdigit() else 0.0
                return message.format(*given, "no reason given", rank=_rank(), seconds=seconds)
    return None


def _rank() -> str:
    return str(dist.get_rank()) if dist.is_initialized() else os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
