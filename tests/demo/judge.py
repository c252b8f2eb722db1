#!/usr/bin/env python3
"""Compares what the actor wrote about held-out prompts before and after PPO.

    judge.py BEFORE.jsonl AFTER.jsonl [--status JOB.json] [--samples N]

Each line of the two files is {"prompt", "response", "reward"}, written by the trainer's PPO stage. Besides the reward that
PPO maximised, VADER judges the responses: a lexicon of words rated by people (Hutto and Gilbert 2014) that no stage was
trained on. Its compound score is -1 for most negative, 1 for most positive. The KL is taken from the job's status.
"""
import argparse
import json
import statistics
import textwrap
from pathlib import Path

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

# VADER's lexicon and its rules for negation ("isn't") know straight quotes only.
STRAIGHT = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": " - "})


def read(path):
    """The lines of a sample file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines if line.strip()]
    if not samples:
        raise SystemExit(f"{path}: holds no sample; did the PPO stage hold out any prompt (prompts.evalFraction)?")
    return samples


def summarize(samples):
    """Mean reward, its standard deviation over the prompts, and VADER's mean compound of the responses."""
    analyzer = SentimentIntensityAnalyzer()
    rewards = [sample["reward"] for sample in samples]
    compounds = [analyzer.polarity_scores(sample["response"].translate(STRAIGHT))["compound"] for sample in samples]
    return {"reward": statistics.fmean(rewards), "reward_sd": statistics.pstdev(rewards), "vader": statistics.fmean(compounds)}


def final_kl(status):
    """The KL of the job's PPO stage over held-out prompts, in nats a response, where the job tells it."""
    for stage in status.get("status", {}).get("stages", []):
        metrics = (stage.get("output") or {}).get("metrics", {})
        if "evalKl" in metrics:
            return metrics["evalKl"]
    return None


def table(before, after, kl):
    """The comparison as lines of text."""
    rows = [
        ("mean reward", before["reward"], after["reward"]),
        ("  standard deviation", before["reward_sd"], after["reward_sd"]),
        ("mean VADER compound", before["vader"], after["vader"]),
        ("KL to the SFT model (nats a response)", 0.0, kl),
    ]
    number = lambda value: "not told" if value is None else f"{value:.3f}"  # noqa: E731
    yield f"{'':40}{'before PPO':>12}{'after PPO':>12}"
    for name, old, new in rows:
        yield f"{name:40}{number(old):>12}{number(new):>12}"
    if before["reward_sd"] > 0:
        gain = (after["reward"] - before["reward"]) / before["reward_sd"]
        yield f"The mean reward changed by {gain:+.2f} standard deviations of the SFT model's rewards."


def continuation(title, sample):
    """One sample as wrapped text, its prompt in brackets."""
    text = f"{title}, reward {sample['reward']:+.2f}: [{sample['prompt']}]{sample['response']}"
    return textwrap.fill(" ".join(text.split()), 110, initial_indent="  ", subsequent_indent="    ")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--status", type=Path, help="the job as `kubectl get rlhfjob NAME -o json` prints it")
    parser.add_argument("--samples", type=int, default=3, help="how many prompts to show")
    args = parser.parse_args()

    before, after = read(args.before), read(args.after)
    if [sample["prompt"] for sample in before] != [sample["prompt"] for sample in after]:
        raise SystemExit(f"{args.before} and {args.after} do not hold the same prompts in the same order")
    kl = final_kl(json.loads(args.status.read_text(encoding="utf-8"))) if args.status else None
    print(f"{len(before)} held-out prompts")
    print("\n".join(table(summarize(before), summarize(after), kl)))
    for old, new in list(zip(before, after))[:args.samples]:
        print("\n" + continuation("before", old) + "\n" + continuation("after", new))


if __name__ == "__main__":
    main()
