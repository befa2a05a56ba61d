"""Neuron2Graph, its trie and n-gram models in plain Python: one token at a time.

It imports nothing of the package. An activation is a function of a list of tokens: that
of one latent at the last of them.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

ANY, START = "any", "start"
Activation = Callable[[list[int]], float]


def find_pattern(
    tokens: list[int], act: float, read: Activation, pads: tuple[int, int], longest: int
):
    """(tokens with ANY, whether anchored, suffix activation) of one context, or None.

    `tokens` end at the one on which the latent has activation `act`.
    """
    for length in range(1, min(longest, len(tokens)) + 1):
        suffix = tokens[-length:]
        suffix_act = read(suffix)
        if suffix_act >= 0.5 * act:
            break
    else:
        return None
    is_anchored = read([pads[0], *suffix]) < 0.5 * act
    pattern: list = []
    for i, token in enumerate(suffix):
        stand_in = pads[1] if token == pads[0] else pads[0]
        replaced = suffix[:i] + [stand_in] + suffix[i + 1 :]
        saliency = 1 - read(replaced) / suffix_act
        pattern.append(ANY if saliency < 0.5 else token)
    return pattern, is_anchored, suffix_act


def insert(trie: dict, pattern: Sequence, is_anchored: bool, value: float) -> None:
    node = trie
    for token in reversed([START, *pattern] if is_anchored else pattern):
        node = node.setdefault(token, {})
    node["value"] = value


def walk(trie: dict, tokens: Sequence[int]) -> float:
    """What the trie predicts at the last of these tokens of a context."""
    node = trie
    for token in reversed(tokens):
        node = node.get(token, node.get(ANY))
        if node is None:
            return 0.0
        if "value" in node:
            return node["value"]
    return node.get(START, {}).get("value", 0.0)


def predict(trie: dict, tokens_st: np.ndarray) -> np.ndarray:
    return np.array(
        [
            [walk(trie, context[: t + 1]) for t in range(len(context))]
            for context in tokens_st.tolist()
        ]
    )


def ngram_log_p(train, wanted, vocab_size: int, longest: int) -> list[np.ndarray]:
    """Log probabilities of the tokens after the first, for n = 1, 2, ..., longest.

    Contexts are lists of any length; their probabilities come one after the other.
    """
    n_counted = len(train) - max(1, len(train) // 10)
    counted, uncounted = train[:n_counted], train[n_counted:]
    counts: list[dict] = []
    for n in range(1, longest + 1):
        followed: dict = {}
        for context in counted:
            for t in range(n - 1, len(context)):
                after = followed.setdefault(tuple(context[t - n + 1 : t]), {})
                after[context[t]] = after.get(context[t], 0) + 1
        counts.append(followed)
    lambdas: list[dict] = []

    def probability(n: int, context, t: int) -> float:
        if n == 0:
            return 1 / vocab_size
        lower = probability(n - 1, context, t)
        share, seen = look_up(n, context, t)
        part = lambdas[n - 1].get(seen.bit_length(), 0) if seen else 0
        return part * share + (1 - part) * lower

    def look_up(n: int, context, t: int) -> tuple[float, int]:
        if t < n - 1:
            return 0.0, 0
        after = counts[n - 1].get(tuple(context[t - n + 1 : t]), {})
        seen = sum(after.values())
        return after.get(context[t], 0) / max(1, seen), seen

    for n in range(1, longest + 1):
        cases: dict = {}
        for context in uncounted:
            for t in range(1, len(context)):
                share, seen = look_up(n, context, t)
                case = share, probability(n - 1, context, t)
                cases.setdefault(seen.bit_length(), []).append(case)
        fitted = {}
        for size, of_size in cases.items():
            part = 0.5
            for _ in range(30):
                part = sum(
                    part * share / (part * share + (1 - part) * lower)
                    for share, lower in of_size
                ) / len(of_size)
            fitted[size] = part
        lambdas.append(fitted)
    return [
        np.array(
            [
                math.log(probability(n, context, t))
                for context in wanted
                for t in range(1, len(context))
            ]
        )
        for n in range(1, longest + 1)
    ]
