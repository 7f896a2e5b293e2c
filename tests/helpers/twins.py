"""Slow, obvious twins of the core: one plain loop a rule, written from the method's formulas and not from our code."""

import itertools
import math
import random
import re
import statistics
import struct
from fractions import Fraction


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


def controller(losses, totals, rates, c):
    """All rules of the controller as one loop; `c` holds the fields of a ControllerConfig by name.

    Returns the phases (a letter a step, `-` without a probe), the merges as tuples (step, hits, forced, S, M, planned
    step, δ, samples, rehearsal steps, w_in, w_out, Λ, c, S after, M after), and the step that failed, or None.
    """
    s, m, ratio = c["interval"], c["rehearsal_steps"], c["rehearsal_steps"] / c["interval"]
    begin, last, hits, forced, window, delta, smooth, rate_sum, signals = s, 0, 0, False, [], None, None, 0.0, []
    phases, merges = "", []
    for g, h in enumerate(losses, start=1):
        since, letter = g - last, "-"
        probed = since % c["probe_every"] == 0
        rate_sum += rates[g - 1]
        if delta is None:
            if probed:
                window.append(h)
                letter = "c"
                if since > int(s * 2 / 3):
                    letter, mean = "t", sum(window) / len(window)
                    if c["threshold_rule"] == "mean":
                        delta = mean * c["threshold_factor"]
                    else:
                        delta = (
                            mean + c["threshold_factor"] * statistics.pstdev(window) if math.isfinite(mean) else mean
                        )
        else:
            value = h
            if probed and c["threshold_rule"] == "zscore":
                before = window[-1] if smooth is None else smooth
                smooth = c["smoothing"] * before + (1 - c["smoothing"]) * h if math.isfinite(h) else before
                value = smooth
            if probed and value >= delta:
                hits, forced, letter = hits + 1, False, "h"
            elif g >= begin + s:
                hits, forced, letter = hits + 1, True, "f"
            elif probed:
                letter = "q"
        phases += letter
        if not (hits >= 3 or (hits >= 1 and g >= begin)):
            continue
        signal = totals[len(merges)] / (s if c["signal_steps"] == "planned" else since)
        if c["signal_per_learning_rate"] and rate_sum > 0:
            signal /= rate_sum / since
        if c["interval_rule"] != "ratio" and not math.isfinite(signal):
            return phases, merges, g
        new_s, factor = s, None
        if c["adaptive"] and len(signals) > c["cold_start"]:
            try:
                new_s, factor = {"ratio": _ratio, "trend": _trend, "smoothed": _smoothed}[c["interval_rule"]](
                    s, signals, signal, c
                )
            except (ZeroDivisionError, ValueError, OverflowError):
                return phases, merges, g
        run = m if c["rehearsal_rule"] == "planned" else int(g * ratio) - int(last * ratio)
        new_m = int(new_s * ratio) if c["adaptive"] else m
        several, short = hits > 1, s <= 70
        table = {(1, 1): (0.5, 0.5), (1, 0): (0.4, 0.6), (0, 1): (0.6, 0.4), (0, 0): (0.5, 0.5)}[several, short]
        weights = c["weights"] or table
        merges.append((g, hits, forced, s, m, begin, delta, len(window), run, *weights, signal, factor, new_s, new_m))
        signals.append(signal)
        s, m, begin, last = new_s, new_m, g + new_s, g
        hits, forced, window, delta, smooth, rate_sum = 0, False, [], None, None, 0.0
    return phases, merges, None


def _ratio(s, signals, signal, c):
    if signal >= signals[-1]:
        factor = signal / signals[-1]
        new = max(c["min_interval"], int(s / factor))
        return (int(new / 2) if new >= 64 else new), factor
    factor = signals[-1] / signal + (1 if s < 64 else 0.5)
    return min(c["max_interval"], int(s * factor)), factor


def _trend(s, signals, signal, c):
    window = [*signals, signal][-c["trend_window"] :]
    up = sum(b > a for a, b in itertools.pairwise(window))
    down = sum(b < a for a, b in itertools.pairwise(window))
    share = up / (up + down) if up + down else 0.5
    if share > 0.5 + c["slack"]:
        return max(c["min_interval"], int(s / c["shrink"])), c["shrink"]
    if share < 0.5 - c["slack"]:
        return min(c["max_interval"], int(s * c["growth"])), c["growth"]
    return s, None


def _smoothed(s, signals, signal, c):
    logs = [math.log(value) for value in signals if value > 0]
    if signal == 0 or not logs:
        return s, None
    average = logs.pop(0)
    for value in logs:
        average = c["smoothing"] * average + (1 - c["smoothing"]) * value
    move = math.log(signal) - average
    if abs(move) <= c["dead_band"]:
        return s, None
    factor = math.exp(min(abs(move), math.log(2)))
    new = round(s / factor if move > 0 else s * factor)
    return min(c["max_interval"], max(c["min_interval"], new)), factor


def fuse_exactly(start, task, rehearsed, weight_in, weight_out):
    """The fusion of three numbers in rational arithmetic, rounded once, to double precision."""
    start, task, rehearsed, w_in, w_out = map(Fraction, (start, task, rehearsed, weight_in, weight_out))
    return float(start + w_in * (task - start) + w_out * (rehearsed - task))


def fuse_in_float32(start, task, rehearsed, weight_in, weight_out):
    """The fusion of three float32 numbers as documented, each step rounded to float32, products added unrounded.

    That is θ_rehearsed + (w_in - 1)·δ_in + (w_out - 1)·δ_out from left to right with fused multiply-add.
    """
    delta_in, delta_out = single(task - start), single(rehearsed - task)
    first = single(Fraction(rehearsed) + Fraction(single(weight_in - 1)) * Fraction(delta_in))
    return single(Fraction(first) + Fraction(single(weight_out - 1)) * Fraction(delta_out))


def single(value):
    """The float32 number nearest to a float or fraction."""
    return struct.unpack("<f", struct.pack("<f", float(value)))[0]


def spacing(value):
    """Distance from a float32 number's magnitude to the next: its ulp."""
    exponent = math.frexp(value)[1] if value else -200
    return 2.0 ** max(exponent - 24, -149)
