"""Slow, obvious twins of the core: one plain loop a rule, written from the method's formulas and not from our code."""

import math
import random
import re


def reference_controller(losses, totals, *, s=8, m=8, factor=2.0, cold=3, s_min=2, s_max=128, adaptive=True):
    """The released controller's rules 1 to 6 as one loop over optimizer steps.

    Returns the phases (one letter a step), the merges as tuples (step, flag, S, M, begin, δ, samples, w_in, w_out, Λ,
    c, S after, M after), and the step at which the arithmetic failed, or None.
    """
    ratio = m / s
    begin, flag, window, delta, signals, since = s, 0, [], None, [], 0
    phases, merges = "", []
    for g in range(1, len(losses) + 1):
        h = losses[g - 1]
        since += 1
        n = int(s * 2 / 3)
        if since <= n:
            window.append(h)
            phases += "c"
        elif since == n + 1:
            window.append(h)
            delta = sum(window) / len(window) * factor
            phases += "t"
        elif h >= delta:
            flag += 1
            phases += "h"
        elif g >= begin + s:
            flag += 1
            phases += "f"
        else:
            phases += "q"

        if not ((g >= begin and flag >= 1) or flag >= 3):
            continue
        several, short = flag > 1, s <= 70
        weights = {(1, 1): (0.5, 0.5), (1, 0): (0.4, 0.6), (0, 1): (0.6, 0.4), (0, 0): (0.5, 0.5)}[several, short]
        new_s, new_m, c = s, m, None
        signal = totals[len(merges)] / s
        try:
            if adaptive and len(signals) > cold:
                if signal >= signals[-1]:
                    c = signal / signals[-1]
                    new_s = max(s_min, int(s / c))
                    if new_s >= 64:
                        new_s = int(new_s / 2)
                else:
                    c = signals[-1] / signal + (1 if s < 64 else 0.5)
                    new_s = min(s_max, int(s * c))
            if adaptive:
                new_m = int(new_s * ratio)
        except (ZeroDivisionError, ValueError, OverflowError):
            return phases, merges, g
        merges.append((g, flag, s, m, begin, delta, len(window), *weights, signal, c, new_s, new_m))
        signals.append(signal)
        s, m, begin, flag, window, delta, since = new_s, new_m, g + new_s, 0, [], None, 0
    return phases, merges, None


def fuse(theta_prev, theta_task, theta_rehearsed, weight_in, weight_out):
    """θ_prev + w_in·δ_in + w_out·δ_out on nested lists of Python floats, one number at a time."""
    if isinstance(theta_prev, list):
        rows = zip(theta_prev, theta_task, theta_rehearsed, strict=True)
        return [fuse(*row, weight_in, weight_out) for row in rows]
    delta_in, delta_out = theta_task - theta_prev, theta_rehearsed - theta_task
    return theta_prev + weight_in * delta_in + weight_out * delta_out


def token_loss(logits, label):
    """-log softmax(logits)[label] of one position, in double precision."""
    highest = max(logits)
    return highest + math.log(sum(math.exp(value - highest) for value in logits)) - logits[label]


def coverage(texts, labels, count, seed):
    """Greedy coverage with classes taking turns, every candidate counted afresh."""
    rng = random.Random(f"{seed}/memory")
    groups = [[i for i, label in enumerate(labels) if label == wanted] for wanted in dict.fromkeys(labels)]
    for group in groups:
        rng.shuffle(group)
    rng.shuffle(groups)
    chosen, turn = [], 0
    while len(chosen) < count:
        group = [i for i in groups[turn % len(groups)] if i not in chosen]
        turn += 1
        if group:
            covered = tokens(texts, chosen)
            gains = [len(tokens(texts, [*chosen, i])) - len(covered) for i in group]
            chosen.append(group[gains.index(max(gains))])
    return sorted(chosen)


def tokens(texts, rows):
    """Words and punctuation marks, lower-cased, that the rows hold together."""
    return {token for row in rows for token in re.findall(r"\w+|[^\w\s]", texts[row].lower())}


def summary(a, s=None):
    """All scores of a complete matrix straight from their formulas; tasks and columns count from 1, 0 is untrained."""
    count = len(a)
    score = {(i, j): a[i - 1][j] for i in range(1, count + 1) for j in range(count + 1)}
    tasks, earlier = range(1, count + 1), range(1, count)
    return {
        "op": sum(score[i, count] for i in tasks) / count,
        "bwt": sum(score[i, count] - score[i, i] for i in earlier) / (count - 1),
        "fwt": sum(score[i, i] - s[i - 1] for i in tasks) / count if s else None,
        "fwt_gem": sum(score[i, i - 1] - score[i, 0] for i in tasks if i > 1) / (count - 1),
        "forgetting": sum(max(score[i, j] for j in range(i, count)) - score[i, count] for i in earlier) / (count - 1),
        "average_incremental": sum(sum(score[i, j] for i in range(1, j + 1)) / j for j in tasks) / count,
        "worst_task": min(score[i, count] for i in tasks),
        "plasticity": sum(score[i, i] for i in tasks) / count,
    }


def longest_common_subsequence(left, right):
    """Its length, by trying both ways at every difference."""
    if not left or not right:
        return 0
    if left[0] == right[0]:
        return 1 + longest_common_subsequence(left[1:], right[1:])
    return max(longest_common_subsequence(left[1:], right), longest_common_subsequence(left, right[1:]))
