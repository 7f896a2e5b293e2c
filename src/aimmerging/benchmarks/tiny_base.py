"""The tiny base models of the offline default: pre-trained here in about a minute, then kept in a cache.

One small transformer of each family learns the generated lessons of :mod:`aimmerging.benchmarks.lessons`. It is saved
like any other model, so everything downstream loads it by its directory.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from aimmerging.benchmarks import lessons, skills
from aimmerging.benchmarks.lessons import Lesson
from aimmerging.errors import ModelError
from aimmerging.training.encoding import IGNORED, Collator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VERSION = 1
"""Of the lessons, the networks and their training: raised by whoever changes what the weights come out as, so that no
cache hands out a model that was made otherwise. tests/benchmarks/test_base_cache.py notices when the lessons change."""

Family = Literal["t5", "llama"]
Progress = Callable[[int, int], None]

_PAD, _EOS, _UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the weights, apart from the text and the library versions."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    embedding_rate: float = 2e-3
    warmup: int = 100
    vocabulary: int = 2048
    seed: int = 0
    bucket: int = 16
    """Batches that are sorted by length together."""


# Embeddings, of words and of relative positions, start larger than matrices and each row is seen rarely: at the rate of
# the matrices Adam would hardly move them. Those of T5 start twenty times as large as those of Llama.
RECIPES: dict[Family, Recipe] = {
    "t5": Recipe(steps=720, embedding_rate=6e-2),
    "llama": Recipe(steps=900, embedding_rate=6e-3),
}


def ensure(
    family: Family = "t5", *, cache: Path | None = None, steps: int | None = None, progress: Progress | None = None
) -> Path:
    """Return the directory of the pre-trained base model, training it first if the cache does not hold it.

    Args:
        family: "t5" for an encoder-decoder, "llama" for a decoder-only model.
        cache: directory of the cache; default $AIMMERGING_CACHE, else ~/.cache/aimmerging.
        steps: optimizer steps instead of the recipe's; such a model is cached apart.
        progress: called with (steps done, steps in all) after every step.

    Models are complete when they appear in the cache: they are built beside it and renamed into place. If another
    process was faster, its model is kept.

    Raises:
        ModelError: the cache cannot be written.
    """
    recipe = RECIPES[family] if steps is None else replace(RECIPES[family], steps=steps)
    cache = cache or Path(os.environ.get("AIMMERGING_CACHE") or Path.home() / ".cache" / "aimmerging")
    finished = cache / f"{family}-{_fingerprint(family, recipe)}"
    if finished.is_dir():
        return finished
    try:
        cache.mkdir(parents=True, exist_ok=True)
        workshop = tempfile.TemporaryDirectory(prefix=".building-", dir=cache)
    except OSError as error:
        raise ModelError(
            f"the tiny base model cannot be kept in {cache}: {error.strerror}; "
            "set the environment variable AIMMERGING_CACHE to a folder that can be written"
        ) from error
    with workshop as folder:
        built = Path(folder) / "model"
        _build(family, recipe, built, progress or (lambda done, total: None))
        try:
            built.rename(finished)
        except OSError:
            if not finished.is_dir():
                raise
    return finished


def _fingerprint(family: Family, recipe: Recipe) -> str:
    """Return a short hash of :data:`VERSION`, recipe and library versions."""
    import torch
    import transformers

    made_of = [VERSION, family, asdict(recipe), torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]


def _build(family: Family, recipe: Recipe, target: Path, progress: Progress) -> None:
    """Train tokenizer and model and save both in `target`."""
    import torch

    with _own_randomness():
        torch.default_generator.manual_seed(recipe.seed)
        random = Random(f"base/{family}/{recipe.seed}")
        tokenizer = _tokenizer(family, recipe)
        model = _model(family, tokenizer)
        _train(model, _batches(family, recipe, tokenizer, random), recipe, progress)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Use one thread, so that sums have one order, and give torch its random state and threads back at the end."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


def _tokenizer(family: Family, recipe: Recipe) -> Any:
    """Train a byte-level BPE on lessons; words of the language become one token, any other text falls into bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[_PAD, _EOS, _UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_text(recipe), trainer)
    if family == "t5":
        end = (_EOS, raw.token_to_id(_EOS))
        raw.post_processor = processors.TemplateProcessing(single=f"$A {_EOS}", special_tokens=[end])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=_PAD, eos_token=_EOS, unk_token=_UNKNOWN)


def _text(recipe: Recipe) -> Iterator[str]:
    """Yield text for the tokenizer: lessons, and the bare instructions and labels of the tasks to make them words too.

    The model itself trains on lessons alone, which hold neither instructions nor labels of sentences.
    """
    labels = [label for labels in skills.LABELS.values() for label in labels]
    yield from 20 * [*skills.INSTRUCTIONS.values(), *labels]
    for prompt, answer in islice(lessons.draw(Random(f"tokenizer/{recipe.seed}")), 20_000):
        yield f"{prompt} {answer}"


def _model(family: Family, tokenizer: Any) -> "PreTrainedModel":
    """Return an untrained model of the family, of about 0.7 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "t5":
        config = T5Config(
            vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=1, num_heads=4,
            dropout_rate=0.0, feed_forward_proj="gated-gelu",
            **ids | {"decoder_start_token_id": tokenizer.pad_token_id},
        )  # fmt: skip
        return T5ForConditionalGeneration(config)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=None, **ids,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _batches(family: Family, recipe: Recipe, tokenizer: Any, random: Random) -> Iterator[dict[str, "torch.Tensor"]]:
    """Yield padded batches without end; rows of like length share one, which saves most of the padding."""
    source = lessons.draw(random)
    encode, collate = _encode_pairs if family == "t5" else _encode_causal, Collator(tokenizer.pad_token_id)
    while True:
        rows = encode(tokenizer, list(islice(source, recipe.batch_size * recipe.bucket)))
        rows.sort(key=lambda row: len(row["input_ids"]))
        batches = [rows[start : start + recipe.batch_size] for start in range(0, len(rows), recipe.batch_size)]
        random.shuffle(batches)
        yield from (collate(batch) for batch in batches)


def _encode_pairs(tokenizer: Any, rows: list[Lesson]) -> list[dict[str, list[int]]]:
    """Encode prompts for the encoder and answers for the decoder."""
    prompts = tokenizer([prompt for prompt, _ in rows])["input_ids"]
    answers = tokenizer([answer for _, answer in rows])["input_ids"]
    return [_feature(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _encode_causal(tokenizer: Any, rows: list[Lesson]) -> list[dict[str, list[int]]]:
    """Encode each prompt with its answer behind it; only the answer and the end carry loss."""
    encoded = []
    for pair in _encode_pairs(tokenizer, rows):
        prompt, answer = pair["input_ids"], [*pair["labels"], tokenizer.eos_token_id]
        encoded.append(_feature(prompt + answer, [IGNORED] * len(prompt) + answer))
    return encoded


def _feature(ids: list[int], labels: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _train(model: "PreTrainedModel", batches: Iterator[dict[str, Any]], recipe: Recipe, progress: Progress) -> None:
    """Train with AdamW, linear warm-up and linear decay."""
    import torch

    def rate(step: int) -> float:
        return min((step + 1) / recipe.warmup, (recipe.steps - step) / recipe.steps)

    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    groups = [
        {"params": [weight for weight in model.parameters() if id(weight) not in tables]},
        {"params": [weight for weight in model.parameters() if id(weight) in tables], "lr": recipe.embedding_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step, batch in enumerate(islice(batches, recipe.steps), start=1):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, recipe.steps)
    model.eval()
