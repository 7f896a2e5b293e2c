"""Supervised fine-tuning of a LoRA adapter with TRL.

    python examples/sft_plain.py MODEL ROWS.jsonl OUT

ROWS.jsonl has a prompt and a completion a row. Run it again with other rows and the same OUT: the adapter goes on.
"""

import sys
from pathlib import Path

import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

base, rows, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
if (out / "adapter_config.json").exists():
    model = PeftModel.from_pretrained(model, str(out), is_trainable=True)
else:
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
arguments = trl.SFTConfig(
    output_dir=str(out / "checkpoints"),
    num_train_epochs=4,
    per_device_train_batch_size=8,
    learning_rate=1e-2,
    save_strategy="no",
    report_to="none",
    bf16=False,
    use_cpu=True,
)
data = Dataset.from_json(rows)
options = {"model": model, "args": arguments, "train_dataset": data, "processing_class": tokenizer}
trainer = trl.SFTTrainer(**options)
trainer.train()
model.save_pretrained(out)
