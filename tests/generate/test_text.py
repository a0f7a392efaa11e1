"""Generation gives what a plain loop over the whole text gives, and streams whole characters."""

from __future__ import annotations

import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig, TransformerXLConfig
from moekit.config.moe import MoEConfig
from moekit.data.documents import Document
from moekit.data.tokenizer import train_tokenizer
from moekit.generate import Sampler, generate
from moekit.generate.text import TextStream
from moekit.models import build_model

TEXT = "the cat sat on the mat. 中文分词很有意思。" * 20
MODELS = {
    "dense": ModelConfig(
        d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, max_seq_len=64, init_std=0.2
    ),
    "moe": ModelConfig(
        d_model=32, n_layers=2, n_heads=2, d_ff=32, max_seq_len=64, init_std=0.2, qk_norm="head",
        moe=MoEConfig(n_experts=4, top_k=2, d_expert=16, n_shared_experts=1),
    ),
    # its keyword holds from there on: a cache of keys and values does not know whether it was there
    "rule": ModelConfig(
        d_model=32, n_layers=2, n_heads=2, d_ff=32, max_seq_len=64, init_std=0.2,
        moe=MoEConfig(n_experts=4, top_k=1, d_expert=16, router={"name": "rule", "options": {
            "rules": [{"expert": 3, "token_ids": [[i] for i in range(60, 75)]}], "scope": "onward"}},
            balance={"load_balance": 0}),
    ),
    "xl": TransformerXLConfig(
        d_model=32, n_layers=2, n_heads=2, d_ff=32, max_seq_len=64, memory_length=64, init_std=0.2
    ),
}  # fmt: skip
PROMPTS = ["the cat", "", "中文", "sat on the mat. the cat", "中文"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document(TEXT, "mixed", "a")], vocab_size=300)


@pytest.fixture(params=list(MODELS))
def model(request, tokenizer):
    torch.manual_seed(0)
    return build_model(MODELS[request.param].replace(vocab_size=tokenizer.vocab_size)).double()


def plain_loop(model, tokenizer, prompt, n_new, number=0, seed=0, **rules):
    """The definition: the whole text through the model for each token; no cache, no memory, no batch."""
    model.eval()
    sampler = Sampler(**rules)
    generator = torch.Generator().manual_seed((seed + number * 0x9E3779B97F4A7C15) % 2**63)
    ids = [tokenizer.end_id, *tokenizer.encode(prompt)]
    new: list[int] = []
    start = max(0, len(ids) - model.config.max_seq_len)
    for _ in range(n_new):
        if isinstance(model.config, ModelConfig) and len(ids) - start > model.config.max_seq_len:
            start = len(ids) - model.config.max_seq_len // 2
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:]])).logits[:, -1]
        token = int(sampler(logits, [ids], generator))
        if token == tokenizer.end_id:
            break
        ids.append(token)
        new.append(token)
    return tuple(new)


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 1},
    ],
)
def test_equals_the_plain_loop(model, tokenizer, rules):
    results = generate(model, tokenizer, PROMPTS, max_new_tokens=20, **rules)
    for number, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        expected = plain_loop(model, tokenizer, prompt, 20, number, **rules)
        assert result.token_ids == expected
        assert result.text == tokenizer.decode(expected)
        assert result.stopped == (len(expected) < 20)
        assert result.tokens_per_second > 0 or not expected


@pytest.mark.parametrize("kind", ["dense", "moe", "rule"])
@pytest.mark.parametrize("prompt", ["the", "the cat sat on the mat. " * 4])
def test_decoder_past_its_window(tokenizer, kind, prompt):
    torch.manual_seed(0)
    model = build_model(MODELS[kind].replace(vocab_size=tokenizer.vocab_size, max_seq_len=12)).double()
    (result,) = generate(model, tokenizer, prompt, max_new_tokens=40, temperature=1.0, stop_at_end=False)
    assert len(result.token_ids) == 40
    (stopping,) = generate(model, tokenizer, prompt, max_new_tokens=40, temperature=1.0)
    assert stopping.token_ids == plain_loop(model, tokenizer, prompt, 40, temperature=1.0)


def test_transformer_xl_past_its_memory(tokenizer):
    """A prompt of several segments equals one pass; beyond the memory, generation goes on."""
    torch.manual_seed(0)
    config = MODELS["xl"].replace(vocab_size=tokenizer.vocab_size, max_seq_len=5, memory_length=40)
    model = build_model(config).double()
    prompt = "the cat sat on the mat. cat on the cat"
    n_prompt = len(tokenizer.encode(prompt)) + 1
    assert n_prompt > 10
    (result,) = generate(
        model, tokenizer, prompt, max_new_tokens=40 - n_prompt, temperature=0, stop_at_end=False
    )
    ids = [tokenizer.end_id, *tokenizer.encode(prompt), *result.token_ids]
    logits = model(torch.tensor([ids])).logits[0, n_prompt - 1 : -1]
    assert logits.argmax(-1).tolist() == list(result.token_ids)
    (longer,) = generate(model, tokenizer, prompt, max_new_tokens=100, temperature=0, stop_at_end=False)
    assert len(longer.token_ids) == 100
    assert longer.token_ids[: len(result.token_ids)] == result.token_ids


def test_transformer_xl_without_memory_still_reads_its_segment(tokenizer):
    torch.manual_seed(0)
    config = MODELS["xl"].replace(vocab_size=tokenizer.vocab_size, memory_length=0, init_std=0.5)
    model = build_model(config).double()
    (result,) = generate(model, tokenizer, "the cat", max_new_tokens=30, temperature=3.0)
    assert result.token_ids == plain_loop(model, tokenizer, "the cat", 30, temperature=3.0)
    assert len(result.token_ids) > 10


def test_neighbours_do_not_change_a_prompt(model, tokenizer):
    """A row that ends early leaves the batch, and the others go on as if it had never been there."""
    together = generate(
        model, tokenizer, ["the", "cat", "mat", "sat"], max_new_tokens=30, temperature=1.5, seed=4
    )
    assert len({len(tokenizer.encode(x)) for x in ("the", "cat", "mat", "sat")}) < 4  # some share a batch
    for number, (prompt, result) in enumerate(zip(["the", "cat", "mat", "sat"], together, strict=True)):
        expected = plain_loop(model, tokenizer, prompt, 30, number, temperature=1.5, seed=4)
        assert result.token_ids == expected


@pytest.mark.parametrize(("kind", "window"), [("dense", 64), ("dense", 8), ("moe", 8), ("xl", 64)])
def test_rows_end_at_different_times(tokenizer, kind, window):
    """The end marker made likely: equal prompts in one batch stop at their own places."""
    torch.manual_seed(3)
    sizes = {"vocab_size": tokenizer.vocab_size, "tie_embeddings": False, "max_seq_len": window}
    model = build_model(MODELS[kind].replace(**sizes)).double()
    with torch.no_grad():
        model.head.weight[tokenizer.end_id] *= 2.5
    prompts = ["the cat"] * 8
    results = generate(model, tokenizer, prompts, max_new_tokens=60, temperature=1.0)
    lengths = [len(result.token_ids) for result in results]
    assert len(set(lengths)) > 2
    for number, result in enumerate(results):
        expected = plain_loop(model, tokenizer, "the cat", 60, number, temperature=1.0)
        assert result.token_ids == expected, number
        assert tokenizer.end_id not in result.token_ids


def test_stop_at_end(tokenizer):
    torch.manual_seed(0)
    model = build_model(MODELS["dense"].replace(vocab_size=tokenizer.vocab_size, tie_embeddings=False))
    torch.nn.init.zeros_(model.head.weight)  # all logits 0: greedy takes token 0
    assert tokenizer.end_id == 0
    (stopped,) = generate(model, tokenizer, "the", max_new_tokens=5, temperature=0)
    assert (stopped.text, stopped.token_ids, stopped.stopped) == ("", (), True)
    (endless,) = generate(model, tokenizer, "the", max_new_tokens=5, temperature=0, stop_at_end=False)
    assert endless.token_ids == (0,) * 5
    assert not endless.stopped


def test_seed(model, tokenizer):
    def run(seed):
        results = generate(model, tokenizer, ["the", "the"], max_new_tokens=12, temperature=1.5, seed=seed)
        return [result.token_ids for result in results]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)[0] != run(1)[1]  # equal prompts draw by themselves
    state = torch.random.get_rng_state()
    run(1)
    assert torch.equal(state, torch.random.get_rng_state())  # a seeded run leaves the global generator alone


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_given_back(model, tokenizer, training):
    model.train(training)
    generate(model, tokenizer, "the", max_new_tokens=2)
    assert model.training == training
    with pytest.raises(RuntimeError):
        generate(model, tokenizer, "the", max_new_tokens=5, stop_at_end=False, on_token=_fail)
    assert model.training == training


def _fail(number: int, piece: str) -> None:
    raise RuntimeError("stop")


def test_works_under_autocast(model, tokenizer):
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        results = generate(model, tokenizer, ["the", "中"], max_new_tokens=8, temperature=0)
    assert all(len(result.token_ids) == 8 or result.stopped for result in results)


class TestStreaming:
    def test_pieces_are_whole_characters_and_make_the_text(self, model, tokenizer):
        pieces: dict[int, list[str]] = {0: [], 1: []}
        results = generate(
            model, tokenizer, ["the cat", "中文"], max_new_tokens=40, temperature=1.5, stop_at_end=False,
            on_token=lambda number, piece: pieces[number].append(piece),
        )  # fmt: skip
        for number, result in enumerate(results):
            assert "".join(pieces[number]) == result.text
            assert all(pieces[number])  # never an empty call

    def test_every_prefix_of_a_chinese_text(self):
        bytewise = train_tokenizer([Document("a", "english", "a")], vocab_size=257)
        text = "中文 and 🙂é。"
        ids = bytewise.encode(text)
        assert len(ids) == len(text.encode())
        stream, shown = TextStream(bytewise), ""
        for number, token in enumerate(ids, start=1):
            shown += stream.push(token)
            assert shown == text.encode()[: _whole(text, number)].decode()
        assert shown + stream.finish() == text

    def test_bytes_that_are_no_text(self):
        """Wrong bytes are shown as replacement characters as soon as it is sure, and the sum is right."""
        bytewise = train_tokenizer([Document("a", "english", "a")], vocab_size=257)
        first, second, third = bytewise.encode("中")
        a = bytewise.encode("a")[0]
        for ids in (
            [first, a, a],
            [third, third, a],
            [first, second],
            [first, first, second, third, a],
            [third] * 9,
        ):
            stream = TextStream(bytewise)
            pieces = [stream.push(token) for token in ids]
            assert "".join(pieces) + stream.finish() == bytewise.decode(ids)
            assert stream.finish() == ""
        stream = TextStream(bytewise)
        assert [stream.push(token) for token in (first, a)] == ["", "\ufffda"]

    def test_a_real_replacement_character_is_text(self):
        bytewise = train_tokenizer([Document("a", "english", "a")], vocab_size=257)
        text = "x\ufffdy\ufffd"
        stream = TextStream(bytewise)
        assert "".join(map(stream.push, bytewise.encode(text))) + stream.finish() == text


def _whole(text: str, n_bytes: int) -> int:
    """Bytes of the characters that lie fully in the first `n_bytes`."""
    end = 0
    for character in text:
        size = len(character.encode())
        if end + size > n_bytes:
            break
        end += size
    return end


def test_one_prompt_several_prompts_none(model, tokenizer):
    assert len(generate(model, tokenizer, "the", max_new_tokens=1)) == 1
    assert generate(model, tokenizer, [], max_new_tokens=1) == []


def test_errors(model, tokenizer):
    with pytest.raises(ConfigError, match="max_new_tokens must be an integer of at least 1; got 0"):
        generate(model, tokenizer, "a", max_new_tokens=0)
    with pytest.raises(ConfigError, match="top_p must be above 0"):
        generate(model, tokenizer, "a", max_new_tokens=1, top_p=0)
    with pytest.raises(ConfigError, match="seed must be an integer of at least 0; got -1"):
        generate(model, tokenizer, "a", max_new_tokens=1, seed=-1)
    with pytest.raises(
        ConfigError, match=r"model\.config must be a ModelConfig or a TransformerXLConfig; got NoneType"
    ):
        generate(torch.nn.Linear(1, 1), tokenizer, "a", max_new_tokens=1)
