"""Episodes a second of stage `ppo`, beside TRL 1.12's PPO: same models, prompts, batch, length, bf16, steps.

`python -m benchmarks.ppo [--artifacts DIRECTORY] [--iterations N] [--rounds N] [--trl-value full] [--full]`.
`trl.experimental.ppo` left TRL after 1.12: `pip install --no-deps trl==1.12.0` in an environment of its own that sees
this one's packages (`python -m venv DIRECTORY`, and a .pth file in it that names this one's site-packages). Rounds take
turns, each side in a new process with a peak memory of its own (`loaded_mb`: before the first episode). Loading is not
timed. Ours is what the stage calls generate, score and update, without self-test, checkpoint and log (`wall` has them);
TRL's is all of `train()`. `benchmarks.ppo_sides` says what either does. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.ppo_sides import PARAMS, SIDES

TRL = "1.12.0"


def measured(side: str, seed: int) -> Any:
    """What a side tells from a process of its own, with the process's peak memory in MB."""
    chosen = [*sys.argv[1:], "--side", side, "--seed", str(seed)]
    # This process has loaded nothing: a child's peak begins with what its parent held.
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.ppo", *chosen]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{side} failed:\n{said}")
    return json.loads(said.splitlines()[-1]) | {"peak_mb": usage.ru_maxrss / 1024}


def compare(options: argparse.Namespace) -> None:
    """Rounds in turns, and what they gave."""
    episodes = options.iterations * options.prompts * options.samples
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for number in range(options.rounds):
        for name in SIDES:
            one = measured(name, number)
            found[name].append(one | {"episodes_per_second": episodes / one["seconds"]})
            print(f"round {number + 1}  {told(name, found[name][-1:])}", flush=True)
    speeds = {name: [one["episodes_per_second"] for one in rounds] for name, rounds in found.items()}
    ratios = [mine / other for mine, other in zip(speeds["ours"], speeds["trl"], strict=True)]
    for name, rounds in found.items():
        print(told(name, rounds))
    print(f"ratio {min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}")
    asked = {name: str(value) for name, value in vars(options).items()}
    print(json.dumps({"rounds": found, "ratio": ratios, "episodes": episodes, "trl": TRL, "options": asked}))


def told(name: str, rounds: list[dict[str, Any]]) -> str:
    """A line about a side: least, median and most episodes a second, the most memory, means of the rest."""
    speeds = [one["episodes_per_second"] for one in rounds]
    spread = " / ".join(f"{value:.2f}" for value in (min(speeds), statistics.median(speeds), max(speeds)))
    golds = [one["gold"] for one in rounds if one["gold"] is not None]
    gold = f"{statistics.mean(golds):.3f}" if golds else "none"
    peak, tokens = max(one["peak_mb"] for one in rounds), statistics.mean(one["response_tokens"] for one in rounds)
    rest = f"gold of the last batch {gold}, {tokens:.1f} tokens a response, optimizer steps {rounds[0]['steps']}"
    return f"{name:<5} {spread} episodes/s, peak {peak:.0f} MB, {rest}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="with data, sft and reward")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3, help="batches of a round, two or more")
    parser.add_argument("--prompts", type=int, default=8, help="of a batch")
    parser.add_argument("--samples", type=int, default=4, help="episodes of each prompt")
    parser.add_argument("--tokens", type=int, default=24, help="longest response")
    parser.add_argument("--prompt-tokens", type=int, default=80, help="longest prompt")
    parser.add_argument("--micro", type=int, default=8, help="episodes of a forward pass in TRL's update")
    parser.add_argument("--trl-value", choices=("lora", "full"), default="lora", help="what of its value model learns")
    parser.add_argument("--full", action="store_true", help="train all weights on both sides")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    minibatch = options.prompts * options.samples // PARAMS["minibatches"]
    if options.prompts % PARAMS["minibatches"] or minibatch % options.micro:
        parser.error(f"a minibatch is half a batch, {minibatch} episodes: --micro {options.micro} must divide it")
    options.trl_value = "full" if options.full else options.trl_value
    installed = {one.version for one in metadata.distributions(name="trl")}
    if installed != {TRL}:
        raise SystemExit(f"trl {TRL} is needed, found {installed or 'none'}: pip install --no-deps trl=={TRL}")
    if options.side is None:
        compare(options)
        return
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TQDM_DISABLE="1")
    options.artifacts = options.artifacts.resolve()
    print(json.dumps(SIDES[options.side](options)))


if __name__ == "__main__":
    main()
