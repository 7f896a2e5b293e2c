"""What training takes of a GPU's memory, as arithmetic: prints the tables of README.md.

    python examples/accelerate/memory.py

Each number is bytes times a count; the counts follow from the model's sizes. Nothing is measured.
"""

from typing import NamedTuple

GIB = 2**30
PROMPT, ANSWER = 1024, 128
"""training.max_input_tokens and training.max_output_tokens at their defaults: the longest row there is."""
RANK = 8
WEIGHT = 2
"""Bytes of a frozen weight, model.dtype: bfloat16."""
TRAINED = 4 + 4 + 4 + 4
"""Bytes of a number of the adapter: float32 weight, gradient and two moments of AdamW."""
BUCKET = 4
"""DDP's copy of a gradient."""
LOGIT = 2 + 4 + 4 + 4
"""Bytes of a logit when it takes most: bfloat16, float32, its log-softmax and its gradient."""


class Sizes(NamedTuple):
    """Of a Llama-like decoder: `queries` and `keys` are heads times their width."""

    hidden: int
    layers: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of a layer: query, key, value, output, gate, up, down."""
        hidden, inner = self.hidden, self.inner
        attention = [(hidden, self.queries), (hidden, self.keys), (hidden, self.keys), (self.queries, hidden)]
        return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]

    @property
    def weights(self) -> int:
        """Number of weights; norms and biases are too few to count."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def adapter(self) -> int:
        """Number of weights of LoRA on all linear layers."""
        return self.layers * RANK * sum(inputs + outputs for inputs, outputs in self.linears)

    @property
    def kept(self) -> int:
        """Bytes that a layer keeps of a token for the backward pass, in bfloat16 with fused attention.

        Both norms: their input in float32. Each adapter: its input in bfloat16 and the mask of its dropout. Attention:
        query, key, value and output. MLP: gate, its activation, and up. Frozen layers keep no input.
        """
        adapters = sum(3 * inputs for inputs, _ in self.linears)
        return 2 * 4 * self.hidden + adapters + 2 * (2 * self.queries + 2 * self.keys) + 2 * 3 * self.inner


MODELS = {
    "0.6B": Sizes(1024, 28, 3072, 2048, 1024, 151936, tied=True),
    "7B": Sizes(3584, 28, 18944, 3584, 512, 152064, tied=False),
    "70B": Sizes(8192, 80, 28672, 8192, 1024, 128256, tied=False),
}
"""Qwen3-0.6B, Qwen2.5-7B and Llama-3.1-70B."""


def parts(sizes: Sizes) -> dict[str, int]:
    """Bytes by what they are for; those of a row are for one of the longest."""
    row = PROMPT + ANSWER
    return {
        "weights": sizes.weights * WEIGHT,
        "adapter, gradient, AdamW": sizes.adapter * TRAINED,
        "DDP's copy of the gradient": sizes.adapter * BUCKET,
        "activations, a row": row * sizes.layers * sizes.kept,
        "the same with checkpointing": row * (sizes.layers * 2 * sizes.hidden + sizes.kept),
        "logits at every position, a row": row * sizes.vocabulary * LOGIT,
        "logits of the answer alone, a row": (ANSWER + 1) * sizes.vocabulary * LOGIT,
    }


def table() -> str:
    """GiB of each part, a column for each model."""
    columns = [parts(sizes) for sizes in MODELS.values()]
    lines = [f"| GiB | {' | '.join(MODELS)} |", "|---|" + "---:|" * len(MODELS)]
    lines += [f"| {name} | {' | '.join(f'{column[name] / GIB:.2f}' for column in columns)} |" for name in columns[0]]
    return "\n".join(lines)


def total(sizes: Sizes, rows: int, *, answer_only: bool, checkpointing: bool) -> int:
    """Bytes on each GPU of DDP with so many rows in a micro-batch, those of the memory among them."""
    of = parts(sizes)
    row = of["the same with checkpointing" if checkpointing else "activations, a row"]
    row += of["logits of the answer alone, a row" if answer_only else "logits at every position, a row"]
    return of["weights"] + of["adapter, gradient, AdamW"] + of["DDP's copy of the gradient"] + rows * row


def totals() -> str:
    """GiB on each GPU for micro-batches of 1, 4 and 8 task rows, each with a quarter of memory rows on top."""
    lines: list[str] = []
    for name, sizes in MODELS.items():
        for task, memory in ((1, 1), (4, 1), (8, 2)):
            kinds = ((False, False), (True, False), (True, True))
            found = [total(sizes, task + memory, answer_only=only, checkpointing=saving) for only, saving in kinds]
            numbers = " | ".join(f"{value / GIB:.0f}" for value in found)
            lines.append(f"| {name} | {task} + {memory} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), totals(), sep="\n\n")
