"""Transformer-XL does what its paper says: recurrence, relative positions, and nothing leaks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.model import TransformerXLConfig
from moekit.models import build_model, relative_attention
from moekit.models.relative_attention import relative_shift, sinusoid_table, undo_relative_shift
from moekit.models.transformer_xl import TransformerXL

VOCAB = 23


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def make(double: bool = True, **changes) -> TransformerXL:
    """A small model whose weights are large enough for every term to matter."""
    sizes = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "max_seq_len": 8,
             "memory_length": 8, "init_std": 0.3}  # fmt: skip
    model = TransformerXL(TransformerXLConfig(**{**sizes, **changes}))
    torch.nn.init.normal_(model.content_bias)
    torch.nn.init.normal_(model.position_bias)
    return (model.double() if double else model).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length))


def naive_attention(content_query, position_query, key_value, relative_key, mask):
    """Section 3.3 as nested loops: the score of each pair from its own distance."""
    batch, n_queries, n_heads, _ = content_query.shape
    n_keys = key_value.shape[1]
    out = torch.zeros_like(content_query)
    for b in range(batch):
        for h in range(n_heads):
            for i in range(n_queries):
                scores = torch.full((n_keys,), -math.inf, dtype=out.dtype)
                for j in range(n_keys):
                    distance = n_keys - n_queries + i - j
                    if distance >= 0 and mask[b, i, j] == 0:
                        r = relative_key[n_keys - distance, h]
                        scores[j] = (
                            content_query[b, i, h] @ key_value[b, j, 0, h] + position_query[b, i, h] @ r
                        )
                out[b, i, h] = torch.softmax(scores, 0) @ key_value[b, :, 1, h]
    return out


def attention_inputs(batch, n_queries, n_keys, n_heads=2, d_head=3):
    shapes = [(batch, n_queries, n_heads, d_head)] * 2
    shapes += [(batch, n_keys, 2, n_heads, d_head), (n_keys + 1, n_heads, d_head)]
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    position = torch.arange(n_keys)
    query_position = position[n_keys - n_queries :, None]
    hidden = (position > query_position) | (
        (position < query_position) & (torch.rand(n_queries, n_keys) < 0.3)
    )
    mask = torch.zeros(batch, n_queries, n_keys, dtype=torch.float64).masked_fill(hidden, -math.inf)
    return inputs, mask


class TestRelativeShift:
    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (3, 3), (5, 11), (7, 8)])
    def test_moves_every_distance_to_its_key(self, queries, keys):
        by_distance = torch.randn(3, queries, keys + 1)
        shifted = relative_shift(by_distance)
        assert shifted.shape == (3, queries, keys)
        for i in range(queries):
            for j in range(keys - queries + i + 1):
                distance = keys - queries + i - j
                assert torch.equal(shifted[:, i, j], by_distance[:, i, keys - distance])

    def test_is_a_view(self):
        by_distance = torch.randn(2, 3, 6)
        assert (
            relative_shift(by_distance).untyped_storage().data_ptr()
            == by_distance.untyped_storage().data_ptr()
        )

    def test_undo_is_the_adjoint(self):
        by_distance, by_key = torch.randn(2, 5, 8), torch.randn(2, 5, 7)
        by_key = by_key.tril(diagonal=2)  # gradients are 0 at keys after the query
        left = (relative_shift(by_distance) * by_key).sum()
        right = (by_distance * undo_relative_shift(by_key)).sum()
        torch.testing.assert_close(left, right)

    def test_sinusoids_by_hand(self):
        table = sinusoid_table(3, 4)  # distances 2, 1, 0; frequencies 1 and 1/100
        expected = [[math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)],
                    [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)],
                    [0.0, 0.0, 1.0, 1.0]]  # fmt: skip
        torch.testing.assert_close(table, torch.tensor(expected))

    def test_odd_width(self):
        assert sinusoid_table(3, 5).shape == (3, 5)


class TestRelativeAttention:
    @pytest.mark.parametrize("block", [1, 2, 64])
    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 6), (5, 5), (5, 12), (7, 9)])
    def test_equals_the_naive_loop(self, queries, keys, block, monkeypatch):
        """Values and gradients, however the work is cut into blocks."""
        monkeypatch.setitem(relative_attention._BLOCK_QUERIES, "cpu", block)
        monkeypatch.setitem(relative_attention._BLOCK_SCORES, "cpu", 2 * block * keys * 2)
        inputs, mask = attention_inputs(3, queries, keys)
        fast = relative_attention.relative_attention(*inputs, mask)
        slow = naive_attention(*inputs, mask)
        torch.testing.assert_close(fast, slow)
        weights = torch.randn_like(slow)
        for a, b in zip(
            torch.autograd.grad((fast * weights).sum(), inputs),
            torch.autograd.grad((slow * weights).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    def test_a_layer_is_the_four_terms_of_the_paper(self):
        """Terms (a) to (d) of section 3.3, each written out, through the weights of one layer."""
        model = make(n_layers=1)
        attention = model.layers[0].attention
        hidden, memory = (
            torch.randn(1, 4, 16, dtype=torch.float64),
            torch.randn(1, 3, 16, dtype=torch.float64),
        )
        mask = torch.full((1, 4, 7), -math.inf, dtype=torch.float64).triu(diagonal=4)
        table = sinusoid_table(8, 16).double()
        u, v = model.content_bias, model.position_bias
        got = attention(hidden, memory, table, u, v, mask)
        w_q, w_k, w_v = attention.qkv.weight.split(16)
        q, context = hidden[0] @ w_q.T, torch.cat([memory[0], hidden[0]])
        k, values, r = context @ w_k.T, context @ w_v.T, table.flip(0) @ attention.relative_key.weight.T
        answer = []
        for i in range(4):
            heads = []
            for h in (slice(0, 8), slice(8, 16)):
                keys = range(3 + i + 1)
                scores = [
                    q[i, h] @ k[j, h] + q[i, h] @ r[3 + i - j, h] + u[h] @ k[j, h] + v[h] @ r[3 + i - j, h]
                    for j in keys
                ]
                weights = torch.softmax(torch.stack(scores) / math.sqrt(8), 0)
                heads.append(weights @ values[: len(keys), h])
            answer.append(torch.cat(heads))
        torch.testing.assert_close(got[0], torch.stack(answer) @ attention.out.weight.T)

    def test_gradient_numerically(self, monkeypatch):
        monkeypatch.setitem(relative_attention._BLOCK_QUERIES, "cpu", 2)
        inputs, mask = attention_inputs(2, 3, 5)
        assert torch.autograd.gradcheck(lambda *x: relative_attention.relative_attention(*x, mask), inputs)


class TestRecurrence:
    @pytest.mark.parametrize("n_layers", [1, 3])
    @pytest.mark.parametrize("pre_norm", [False, True])
    def test_two_segments_equal_one_pass(self, n_layers, pre_norm):
        model = make(n_layers=n_layers, pre_norm=pre_norm)
        ids = tokens(2, 14)
        whole = model(ids).logits
        first = model(ids[:, :7])
        second = model(ids[:, 7:], memory=first.memory)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)

    def test_one_token_at_a_time_equals_one_pass(self):
        model = make()
        ids = tokens(2, 9)
        memory, steps = None, []
        for position in range(9):
            out = model(ids[:, position : position + 1], memory=memory)
            memory = out.memory
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits)

    def test_context_grows_with_depth(self):
        """With a memory of m, layer n sees n * m back: the paper's reach beyond one memory."""
        ids = tokens(1, 9)
        other = ids.clone()
        other[:, 0] = (other[:, 0] + 1) % VOCAB

        def last(model, sequence):
            memory = None
            for start in range(0, 9, 3):
                out = model(sequence[:, start : start + 3], memory=memory)
                memory = out.memory
            return out.logits[:, 0]

        shallow, deep = make(n_layers=1, memory_length=3), make(n_layers=2, memory_length=3)
        assert torch.equal(last(shallow, ids), last(shallow, other))
        assert not torch.allclose(last(deep, ids), last(deep, other))

    def test_memory_carries_no_gradient(self):
        model = make(tie_embeddings=False)
        first = model(torch.tensor([[0, 1, 2, 3, 4]]))
        assert not any(tensor.requires_grad for tensor in first.memory.values())
        later = torch.tensor([[10, 11, 12]])
        model(later, memory=first.memory).logits.pow(2).sum().backward()
        touched = model.stem.weight.grad.abs().sum(1).nonzero().flatten().tolist()
        assert touched == [10, 11, 12]  # the tokens of the first segment receive nothing
        # and yet the memory counts: as free numbers it would have a gradient
        free = {
            k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in first.memory.items()
        }
        model(later, memory=free).logits.pow(2).sum().backward()
        assert free["layer_0"].grad.abs().sum() > 0
        assert free["layer_1"].grad.abs().sum() > 0

    def test_memory_does_not_change_when_used(self):
        model = make()
        memory = model(tokens(2, 6)).memory
        before = {name: tensor.clone() for name, tensor in memory.items()}
        model(tokens(2, 6), memory=memory)
        assert all(torch.equal(memory[name], before[name]) for name in before)

    def test_lengths_in_training_and_evaluation(self):
        model = make(memory_length=3, eval_memory_length=10)
        ids = tokens(2, 8)
        model.train()
        assert model(ids).memory["layer_0"].shape == (2, 3, 16)
        model.eval()
        memory = model(ids).memory
        assert memory["layer_1"].shape == (2, 8, 16)
        assert model(ids, memory=memory).memory["filled"].shape == (2, 10)
        model.train()  # the longer memory is cut to the three latest states
        short = {name: tensor[:, -3:] for name, tensor in memory.items()}
        assert torch.equal(model(ids, memory=memory).logits, model(ids, memory=short).logits)
        assert not torch.equal(model(ids, memory=memory).logits, model(ids).logits)

    @pytest.mark.parametrize("length", [2, 5, 8])
    def test_memory_holds_the_inputs_of_the_layers(self, length):
        model = make(memory_length=5)
        ids = tokens(2, 9)
        memory = None
        for part in ids.split(length, dim=1):
            memory = model(part, memory=memory).memory
        embedded = model.stem.weight[ids] * 4.0  # sqrt(d_model)
        torch.testing.assert_close(memory["layer_0"], embedded[:, -5:].detach())

    def test_no_memory_at_all(self):
        model = make(memory_length=0)
        first = model(tokens(1, 4))
        assert first.memory["layer_0"].shape == (1, 0, 16)
        ids = tokens(1, 4)
        assert torch.equal(model(ids, memory=first.memory).logits, model(ids).logits)

    def test_longer_memory_changes_the_prediction(self):
        ids = tokens(1, 24)

        def run(length):
            torch.manual_seed(1)
            model, memory = make(eval_memory_length=length), None
            for part in ids.split(8, dim=1):
                out = model(part, memory=memory)
                memory = out.memory
            return out.logits

        results = [run(length) for length in (0, 4, 8, 16)]
        for a, b in itertools.pairwise(results):
            assert not torch.allclose(a, b)

    def test_saved_memory_gives_the_same_continuation(self, tmp_path):
        from safetensors.torch import load_file, save_file

        model = make(memory_length=5)
        memory = model(
            tokens(2, 8), segment_ids=torch.arange(8).div(3, rounding_mode="floor").expand(2, 8)
        ).memory
        save_file(memory, tmp_path / "memory.safetensors")
        # a copy, because a mapped file starts at odd addresses, where matrix products may round another way
        loaded = {name: tensor.clone() for name, tensor in load_file(tmp_path / "memory.safetensors").items()}
        ids, documents = tokens(2, 6), torch.full((2, 6), 2)
        expected = model(ids, segment_ids=documents, memory=memory).logits
        assert torch.equal(model(ids, segment_ids=documents, memory=loaded).logits, expected)


class TestVisibility:
    def test_causal(self):
        model = make()
        memory = model(tokens(1, 5)).memory
        ids = tokens(1, 8)
        before = model(ids, memory=memory).logits
        for position in range(8):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % VOCAB
            after = model(changed, memory=memory).logits
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.allclose(after[:, position:], before[:, position:])

    def test_depends_on_relative_positions_only(self):
        """The same text predicts the same wherever it stands, however long the unseen past."""
        model = make(max_seq_len=20)
        text = tokens(1, 6)
        alone = model(text).logits
        for shift in (1, 4, 9):
            ids = torch.cat([tokens(1, shift), text, tokens(1, 2)], 1)
            documents = torch.tensor([[0] * shift + [1] * 6 + [2] * 2])
            inside = model(ids, segment_ids=documents).logits[:, shift : shift + 6]
            torch.testing.assert_close(inside, alone)

    def test_distance_matters(self):
        """The counterpart: the same neighbour at another distance predicts another thing."""
        model = make()
        near, far = torch.tensor([[1, 5, 2]]), torch.tensor([[5, 1, 2]])
        assert not torch.allclose(model(near).logits[:, -1], model(far).logits[:, -1])

    def test_documents_do_not_leak(self):
        model = make()
        ids = tokens(2, 8)
        documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3, 3, 3]])
        out = model(ids, segment_ids=documents).logits
        torch.testing.assert_close(out[:1, 3:7], model(ids[:1, 3:7]).logits)
        torch.testing.assert_close(out[:1, 7:], model(ids[:1, 7:]).logits)
        torch.testing.assert_close(out[1:], model(ids[1:]).logits)

    def test_documents_do_not_leak_through_memory(self):
        model = make(memory_length=16)
        first_ids, ids = tokens(1, 8), tokens(1, 8)
        first_documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
        memory = model(first_ids, segment_ids=first_documents).memory
        documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])
        out = model(ids, segment_ids=documents, memory=memory).logits
        # document 1 goes on over the border, document 2 starts afresh, document 0 is out of reach
        whole = model(torch.cat([first_ids[:, 4:], ids[:, :3]], 1)).logits
        torch.testing.assert_close(out[:, :3], whole[:, 4:])
        torch.testing.assert_close(out[:, 3:], model(ids[:, 3:]).logits)

    @pytest.mark.parametrize("with_memory", [False, True])
    def test_padding_is_never_seen(self, with_memory):
        model = make()
        ids = tokens(1, 8)
        memory = model(tokens(1, 4)).memory if with_memory else None
        real = torch.tensor([[True, True, False, False, True, True, True, False]])
        other = torch.where(real, ids, (ids + 1) % VOCAB)
        a, b = (model(x, token_mask=real, memory=memory) for x in (ids, other))
        assert torch.equal(a.logits[real], b.logits[real])
        assert a.logits.isfinite().all()
        following = tokens(1, 4)
        c, d = (model(following, memory=x.memory).logits for x in (a, b))
        assert torch.equal(c, d)
        assert torch.equal(a.memory["filled"][:, -8:], real)

    def test_left_padding_changes_nothing(self):
        model = make()
        ids = tokens(1, 5)
        padded = torch.cat([tokens(1, 3), ids], 1)
        real = torch.tensor([[False] * 3 + [True] * 5])
        torch.testing.assert_close(model(padded, token_mask=real).logits[:, 3:], model(ids).logits)

    def test_row_of_padding_is_finite(self):
        model = make().train()
        out = model(tokens(2, 4), targets=tokens(2, 4), token_mask=torch.tensor([[False] * 4, [True] * 4]))
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestOutput:
    @pytest.mark.parametrize("tied", [True, False])
    def test_losses_follow_the_targets(self, tied):
        model = make(tie_embeddings=tied)
        ids, targets = tokens(2, 6), tokens(2, 6)
        targets[0, :4] = -100
        out = model(ids, targets=targets, return_token_losses=True)
        expected = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        )
        assert out.n_targets == 8
        assert out.token_losses.dtype == torch.float32
        torch.testing.assert_close(out.token_losses, expected.view(2, 6))
        torch.testing.assert_close(out.loss.float(), expected.sum() / 8)
        quiet = model(ids, targets=targets, return_logits=False)
        assert quiet.logits is None
        assert quiet.token_losses is None
        assert model(ids).loss is None

    @pytest.mark.parametrize("changes", [{}, {"pre_norm": True}, {"tie_embeddings": False}, {"d_head": 5}])
    def test_gradient_reaches_every_parameter(self, changes):
        model = make(**changes).train()
        memory = model(tokens(2, 8)).memory
        model(tokens(2, 8), targets=tokens(2, 8), memory=memory).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    def test_recompute_gives_the_same_gradients(self):
        model = make(dropout=0.3).train()
        ids, targets = tokens(2, 8), tokens(2, 8)
        memory = model(ids).memory
        gradients = []
        for recompute in (False, True):
            model.recompute = recompute
            torch.manual_seed(5)
            loss = model(ids, targets=targets, memory=memory).loss
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)

    def test_autocast_stays_near_float32(self):
        model = make(double=False)
        first, ids = tokens(2, 8), tokens(2, 8)
        expected = model(ids, targets=ids, memory=model(first).memory)
        with torch.autocast("cpu", torch.bfloat16):
            memory = model(first).memory
            out = model(ids, targets=ids, memory=memory)
        out.loss.backward()
        assert out.logits.dtype == torch.bfloat16
        torch.testing.assert_close(out.loss, expected.loss, rtol=0.03, atol=0.03)
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_segments_longer_than_announced(self):
        model = make(max_seq_len=4, memory_length=4)
        ids = tokens(1, 30)
        torch.testing.assert_close(model(ids).logits[:, :10], model(ids[:, :10]).logits)

    def test_inference_mode_does_not_spoil_training(self):
        model = make(double=False)
        with torch.inference_mode():
            model(tokens(1, 8))
        model(tokens(1, 8), targets=tokens(1, 8)).loss.backward()

    def test_state_dict_has_parameters_only(self):
        model = make()
        model(tokens(1, 8))
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def test_build_model_makes_it(self):
        config = TransformerXLConfig(vocab_size=VOCAB, d_model=8, n_layers=1, n_heads=2, d_ff=8)
        assert isinstance(build_model(config), TransformerXL)

    def test_first_loss_is_that_of_a_guess(self):
        model = TransformerXL(TransformerXLConfig(vocab_size=512, d_model=64, n_layers=2, d_ff=64))
        ids = torch.randint(512, (4, 32))
        assert model(ids, targets=torch.randint(512, (4, 32))).loss.item() == pytest.approx(
            math.log(512), abs=0.1
        )

    def test_errors(self):
        model = make()
        memory = model(tokens(2, 4)).memory
        with pytest.raises(
            ConfigError, match=r"memory must have as many rows as token_ids \(3\); got .* 2 rows"
        ):
            model(tokens(3, 4), memory=memory)
        with pytest.raises(ConfigError, match=r"memory must hold .*layer_1.*; got filled, segment_ids"):
            model(tokens(2, 4), memory={k: memory[k] for k in ("filled", "segment_ids")})
        with pytest.raises(ConfigError, match="cache is for the decoder"):
            model(tokens(2, 4), cache=object())


def train(model: TransformerXL, batches, steps: int, lr: float = 3e-3) -> float:
    """Train on consecutive segments with their memory; the last loss."""
    model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    memory = None
    for _, (ids, targets, documents) in zip(range(steps), batches, strict=False):
        out = model(ids, targets=targets, segment_ids=documents, memory=memory)
        memory = out.memory
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return out.loss.item()


def test_overfits_a_few_sequences():
    model = make(init_std=0.02, d_model=32)
    ids = tokens(4, 9)

    def batches():
        while True:
            yield ids[:, :-1], ids[:, 1:], torch.zeros(4, 8, dtype=torch.long)

    # from one step to the next the memory holds the sequences themselves
    assert train(model, batches(), 150) < 0.1


def test_memory_helps_on_a_periodic_text():
    """Random text of period 12 in segments of 4: only a memory can know what comes next."""
    period, length = 12, 4

    def stream():
        document = 0
        while True:
            text = tokens(8, period).repeat(1, 3)
            for start in range(0, 2 * period, length):
                part = text[:, start : start + length + 1]
                yield part[:, :-1], part[:, 1:], torch.full((8, length), document)
            document += 1

    model = make(
        init_std=0.02, d_model=48, n_layers=2, memory_length=16, eval_memory_length=16, max_seq_len=4
    )
    train(model, stream(), 450, lr=5e-3)

    @torch.no_grad()
    def loss_in_second_period(memory_length):
        torch.manual_seed(3)
        losses, memory = [], None
        for number, (ids, targets, documents) in zip(range(60), stream(), strict=False):
            out = model(
                ids, targets=targets, segment_ids=documents, memory=memory, memory_length=memory_length
            )
            memory = out.memory
            if number % 6 >= 3:
                losses.append(out.loss.item())
        return sum(losses) / len(losses)

    model.eval()
    none, some, full = (loss_in_second_period(length) for length in (0, 6, 16))
    assert full < 0.5 * none
    assert full < some
